//! Networks: what reaches what, by which address and port, and what is refused.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    machine::{Machine, fetch_page},
    pods::{Bench, Pod, container, host_network_pod, pod, script, wait_for},
};
use tonic::Code;

fn port(host_port: i32, host_ip: &str) -> cri::PortMapping {
    cri::PortMapping {
        protocol: cri::Protocol::Tcp.into(),
        container_port: 8080,
        host_port,
        host_ip: host_ip.to_owned(),
    }
}

/// Starts the page server and waits until it serves.
async fn serve(bench: &mut Bench, pod: &Pod, address: &str) -> Result<String> {
    let toolbox = bench.toolbox.clone();
    let id = bench
        .launch(pod, container("page", &toolbox, &["page-server", address]))
        .await?;
    let log = bench.status(&id).await?.log_path;
    wait_for("the page server to serve", async || {
        Ok(std::fs::read_to_string(&log).is_ok_and(|text| text.contains("serving on")))
    })
    .await?;
    Ok(id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_reached_by_its_addresses_and_host_ports() -> Result<()> {
    let mut bench = Bench::start().await?;
    // An address of the host beside loopback.
    bench
        .machine()
        .output("ip", &["link", "add", "uplink", "type", "bridge"])?;
    bench
        .machine()
        .output("ip", &["addr", "add", "198.51.100.7/24", "dev", "uplink"])?;
    bench
        .machine()
        .output("ip", &["link", "set", "uplink", "up"])?;
    bench.node.mark_clean()?;
    let mut config = pod("reached");
    config.port_mappings = vec![port(18080, ""), port(18081, "127.0.0.1"), port(0, "")];
    let pod = bench.run(config).await?;
    serve(&mut bench, &pod, "[::]:8080").await?;
    let addresses = bench.addresses(&pod).await?;
    assert!(
        addresses[0].is_ipv4() && addresses.len() == 2 && addresses[1].is_ipv6(),
        "{addresses:?}"
    );
    for address in &addresses {
        let page = fetch_page(bench.machine(), SocketAddr::new(*address, 8080))?;
        assert!(page.contains("Hello from reached"), "{page}");
    }
    for address in ["127.0.0.1:18080", "198.51.100.7:18080", "127.0.0.1:18081"] {
        let page =
            fetch_page(bench.machine(), address.parse()?).with_context(|| address.to_owned())?;
        assert!(page.contains("Hello from reached"), "{page}");
    }
    assert!(
        fetch_page(bench.machine(), "198.51.100.7:18081".parse()?).is_err(),
        "bound to loopback"
    );
    bench.remove(&pod).await?;
    assert!(
        fetch_page(bench.machine(), "127.0.0.1:18080".parse()?).is_err(),
        "withdrawn"
    );
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_reach_each_other_and_themselves() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("server");
    config.port_mappings = vec![port(18080, "")];
    let server = bench.run(config).await?;
    let inside = serve(&mut bench, &server, "[::]:8080").await?;
    let client = bench.run(pod("client")).await?;
    serve(&mut bench, &client, "127.0.0.1:9000").await?;
    let addresses = bench.addresses(&server).await?;
    let other = bench.addresses(&client).await?;
    assert!(addresses.iter().all(|address| !other.contains(address)));
    let gateway = bench.exec_ok(&inside, "ip route show default").await?;
    let gateway = gateway
        .split_whitespace()
        .nth(2)
        .context("a gateway")?
        .to_owned();
    let mut targets: Vec<SocketAddr> = addresses
        .iter()
        .map(|ip| SocketAddr::new(*ip, 8080))
        .collect();
    // By the host's port: from another pod, and back to itself (hairpin).
    targets.push(format!("{gateway}:18080").parse()?);
    for from in [&client, &server] {
        for target in &targets {
            let page = fetch_from(&bench, from, *target)
                .await
                .with_context(|| format!("{target}"))?;
            assert!(page.contains("Hello from server"), "{page}");
        }
    }
    // Loopback is each pod's own.
    let refused = fetch_from(&bench, &server, "127.0.0.1:9000".parse()?).await;
    assert!(refused.is_err());
    bench.finish().await
}

/// Fetches a page from inside a pod's network namespace.
async fn fetch_from(bench: &Bench, pod: &Pod, target: SocketAddr) -> Result<String> {
    let place = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&pod.id)
        .join("ns/net");
    let mut command = std::process::Command::new("nsenter");
    command
        .arg(format!("--net={}", place.display()))
        .args(["sh", "-c"])
        .arg(format!(
            // The shell of the host has no HTTP; python3 or bash would be one more package.
            "exec {} --fetch {target}",
            fetcher()?.display()
        ));
    let output = bench.machine().run(move || command.output())?;
    anyhow::ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn fetcher() -> Result<std::path::PathBuf> {
    longshore_tests::page_server()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_reach_the_world_through_the_host_and_the_world_their_ports() -> Result<()> {
    let mut bench = Bench::start().await?;
    let world = Machine::start()?;
    bench
        .machine()
        .connect("up0", "203.0.113.1/24", &world, "up1", "203.0.113.2/24")?;
    bench.machine().output(
        "ip",
        &["addr", "add", "2001:db8:1::1/64", "dev", "up0", "nodad"],
    )?;
    world.output(
        "ip",
        &["addr", "add", "2001:db8:1::2/64", "dev", "up1", "nodad"],
    )?;
    bench
        .machine()
        .output("ip", &["route", "add", "default", "via", "203.0.113.2"])?;
    bench.machine().output(
        "ip",
        &["-6", "route", "add", "default", "via", "2001:db8:1::2"],
    )?;
    // The kernel adds routes of its own once it sees the carrier.
    let machine = bench.machine().clone();
    wait_for("the uplink to settle", async || {
        let routes = machine.output("ip", &["-6", "route", "show", "table", "all"])?;
        Ok(routes.contains("anycast 2001:db8:1::") && routes.contains("local 2001:db8:1::1"))
    })
    .await?;
    bench.node.mark_clean()?;
    let mut config = pod("outward");
    config.port_mappings = vec![port(18080, "")];
    let pod = bench.run(config).await?;
    serve(&mut bench, &pod, "[::]:8080").await?;
    for address in ["203.0.113.2:80", "[2001:db8:1::2]:80"] {
        let address: SocketAddr = address.parse()?;
        let listener = world.listen(&address.to_string())?;
        let answer = std::thread::spawn(move || -> Result<IpAddr> {
            let (mut stream, peer) = listener.accept()?;
            // All of it: closing with unread bytes would reset the connection.
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                request.push(byte[0]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nthe world\n")?;
            Ok(peer.ip())
        });
        let page = fetch_from(&bench, &pod, address).await?;
        assert!(page.contains("the world"), "{page}");
        let peer = answer.join().expect("the listener's thread")?;
        let expected: [IpAddr; 2] = ["203.0.113.1".parse()?, "2001:db8:1::1".parse()?];
        assert!(
            expected.contains(&peer),
            "comes with the host's address, not {peer}"
        );
    }
    let page = fetch_page(&world, "203.0.113.1:18080".parse()?)?;
    assert!(page.contains("Hello from outward"), "{page}");
    // What is for loopback only must not be reached from outside by a forged route (CVE-2020-8558).
    world
        .output(
            "ip",
            &["route", "add", "127.1.2.3/32", "via", "203.0.113.1"],
        )
        .unwrap_or_default();
    bench.remove(&pod).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_in_the_hosts_network_has_no_network_of_its_own() -> Result<()> {
    let mut bench = Bench::start().await?;
    let pod = bench.run(host_network_pod("host-network")).await?;
    let status = bench.pod_status(&pod).await?;
    assert_eq!(status.network.unwrap_or_default().ip, "");
    serve(&mut bench, &pod, "127.0.0.1:8088").await?;
    assert!(fetch_page(bench.machine(), "127.0.0.1:8088".parse()?)?.contains("Hello"));
    let links = bench
        .machine()
        .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?;
    assert_eq!(
        links.lines().count(),
        2 + links.lines().filter(|line| line.contains(':')).count()
    );
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_port_is_refused_with_its_holder() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("holder");
    config.port_mappings = vec![port(18080, "")];
    let holder = bench.run(config).await?;
    for host_ip in ["", "127.0.0.1"] {
        let mut config = pod("late");
        config.port_mappings = vec![port(18080, host_ip)];
        let error = bench.run(config).await.expect_err("taken");
        let status = error.downcast_ref::<tonic::Status>().context("a status")?;
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        assert!(
            status.message().contains(&holder.id) && status.message().contains("18080"),
            "{status:?}"
        );
    }
    // Twice in one pod is a conflict of its own.
    let mut config = pod("twice");
    config.port_mappings = vec![port(18090, ""), port(18090, "")];
    bench.run(config).await.expect_err("twice in one pod");
    // UDP is another port.
    let mut config = pod("udp");
    config.port_mappings = vec![cri::PortMapping {
        protocol: cri::Protocol::Udp.into(),
        ..port(18080, "")
    }];
    bench.run(config).await?;
    bench.remove(&holder).await?;
    let mut config = pod("next");
    config.port_mappings = vec![port(18080, "")];
    bench.run(config).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_ports_lead_into_the_pod() -> Result<()> {
    let mut bench = Bench::start().await?;
    let mut config = pod("udp");
    config.port_mappings = vec![cri::PortMapping {
        protocol: cri::Protocol::Udp.into(),
        container_port: 5353,
        host_port: 15353,
        host_ip: String::new(),
    }];
    let pod = bench.run(config).await?;
    let place = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&pod.id)
        .join("ns/net");
    // The receiver is a socket of ours, made inside the pod's namespace by a thread that then ends.
    let receiver = bench.machine().run(move || {
        std::thread::spawn(move || -> Result<UdpSocket> {
            let file = std::fs::File::open(place)?;
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(UdpSocket::bind("0.0.0.0:5353")?)
        })
        .join()
        .expect("no panic")
    })?;
    receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
    bench.machine().run(|| -> Result<()> {
        UdpSocket::bind("127.0.0.1:0")?.send_to(b"datagram", "127.0.0.1:15353")?;
        Ok(())
    })?;
    let mut buffer = [0; 64];
    let (length, _) = receiver.recv_from(&mut buffer).context("nothing arrived")?;
    assert_eq!(&buffer[..length], b"datagram");
    drop(receiver);
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pods_get_addresses_of_their_own_and_give_them_back() -> Result<()> {
    let mut bench =
        Bench::start_configured("[network]\nipv4 = \"10.66.0.0/28\"\nipv6 = \"none\"\n").await?;
    let mut pods = Vec::new();
    let mut all = std::collections::BTreeSet::new();
    let exhausted = loop {
        match bench.run(pod("many")).await {
            Ok(pod) => {
                let addresses = bench.addresses(&pod).await?;
                assert_eq!(addresses.len(), 1);
                assert!(all.insert(addresses[0]), "{addresses:?} twice");
                pods.push(pod);
            }
            Err(error) => break error,
        }
        anyhow::ensure!(pods.len() < 20, "more pods than addresses");
    };
    let status = exhausted
        .downcast_ref::<tonic::Status>()
        .context("a status")?;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(pods.len() >= 12, "only {} pods in a /28", pods.len());
    bench.remove(&pods.remove(0)).await?;
    bench.run(pod("one-more")).await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_made_side_by_side_share_nothing() -> Result<()> {
    let bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let runs = (0..12).map(|number| {
        let mut runtime = bench.runtime.clone();
        let mut config = pod(&format!("side-{number}"));
        config.log_directory = bench
            .node
            .log_dir()
            .join(number.to_string())
            .to_string_lossy()
            .into_owned();
        config.port_mappings = vec![port(19000 + number, "")];
        let toolbox = toolbox.clone();
        tokio::spawn(async move {
            let request = cri::RunPodSandboxRequest {
                config: Some(config.clone()),
                ..Default::default()
            };
            let id = runtime
                .run_pod_sandbox(request)
                .await?
                .into_inner()
                .pod_sandbox_id;
            let request = cri::CreateContainerRequest {
                pod_sandbox_id: id.clone(),
                config: Some(script("main", &toolbox, "cat /etc/hostname; sleep 10000")),
                sandbox_config: Some(config),
            };
            let container_id = runtime
                .create_container(request)
                .await?
                .into_inner()
                .container_id;
            runtime
                .start_container(cri::StartContainerRequest { container_id })
                .await?;
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: id.clone(),
            };
            runtime.stop_pod_sandbox(request).await?;
            runtime
                .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await?;
            anyhow::Ok(())
        })
    });
    for run in futures_util::future::join_all(runs).await {
        run??;
    }
    bench.finish().await
}
