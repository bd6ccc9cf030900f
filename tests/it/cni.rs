//! Networks of CNI: Debian's plugins as they are, and one of our own that misbehaves as told.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use longshore_proto::{
    cri::v1 as cri,
    longshore::v1::{
        self as api, network_service_client::NetworkServiceClient,
        operation_service_client::OperationServiceClient,
    },
};
use longshore_tests::{
    machine::{Machine, fetch_page},
    pods::{Bench, Pod, container, host_network_pod, pod, wait_for},
    skip,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

/// Where Debian has the plugins.
const DEBIAN: &str = "/usr/lib/cni";

/// Folders of configurations, plugins, and what plugins keep; outside of the agent's.
struct Folders {
    dir: TempDir,
}

impl Folders {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ls-cni-").tempdir()?;
        for name in ["net.d", "bin", "leases", "record"] {
            fs::create_dir(dir.path().join(name))?;
        }
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The agent's settings; `more` goes into `[network.cni]`.
    fn config(&self, mode: &str, more: &str) -> String {
        format!(
            "[network]\nmode = \"{mode}\"\n[network.cni]\nconf_dir = {:?}\nbin_dirs = [{:?}, {DEBIAN:?}]\n{more}\n",
            self.path("net.d"),
            self.path("bin"),
        )
    }

    fn write(&self, file: &str, conf: &Value) -> Result<()> {
        // As installers do, so that no half is ever read.
        let (new, file) = (self.path("net.d/new"), self.path(&format!("net.d/{file}")));
        fs::write(&new, conf.to_string())?;
        Ok(fs::rename(new, file)?)
    }

    fn remove(&self, file: &str) -> Result<()> {
        Ok(fs::remove_file(self.path(&format!("net.d/{file}")))?)
    }

    /// host-local's settings, with its files in a folder of the test.
    fn pool(&self, subnets: &[&str]) -> Value {
        let ranges: Vec<_> = subnets
            .iter()
            .map(|subnet| json!([{ "subnet": subnet }]))
            .collect();
        let routes: Vec<_> = subnets
            .iter()
            .map(|subnet| json!({ "dst": if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" } }))
            .collect();
        json!({ "type": "host-local", "dataDir": self.path("leases"), "ranges": ranges, "routes": routes })
    }

    /// Addresses that host-local counts as taken.
    fn leases(&self, network: &str) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.path("leases").join(network))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "lock" && !name.starts_with("last_reserved_ip") {
                all.push(name);
            }
        }
        all.sort();
        Ok(all)
    }

    /// Installs our own plugin under this name. It notes each call and what it was given, does what
    /// the file `on-<name>-<COMMAND>` says, and else answers ADD with two addresses.
    fn plugin(&self, name: &str) -> Result<()> {
        let script = format!(
            r#"#!/bin/sh
cd {record} || exit 9
cat > "{name}-$CNI_COMMAND.json"
env | grep '^CNI_' | sort > "{name}-$CNI_COMMAND.env"
echo "$CNI_COMMAND {name} $CNI_CONTAINERID $CNI_NETNS" >> calls
if test -e "on-{name}-$CNI_COMMAND"; then . "./on-{name}-$CNI_COMMAND"; exit; fi
if test "$CNI_COMMAND" = ADD; then
    echo '{{"cniVersion":"1.1.0","interfaces":[{{"name":"hostside"}},{{"name":"eth0","mac":"02:00:00:00:00:07","sandbox":"'"$CNI_NETNS"'"}}],'
    echo '"ips":[{{"address":"fd09::5/64","interface":1}},{{"address":"10.9.0.5/24","gateway":"10.9.0.1","interface":1}},{{"address":"10.9.1.5/24","interface":1}}]}}'
fi
"#,
            record = self.path("record").display(),
        );
        let path = self.path("bin").join(name);
        fs::write(&path, script)?;
        Ok(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o755),
        )?)
    }

    /// What our plugin does when it is asked, from now on; none is what it does by itself.
    fn on(&self, plugin: &str, command: &str, script: Option<&str>) -> Result<()> {
        let path = self.path("record").join(format!("on-{plugin}-{command}"));
        match script {
            Some(script) => Ok(fs::write(path, script)?),
            None => Ok(fs::remove_file(path)?),
        }
    }

    /// `COMMAND plugin` of every call for this pod, in order.
    fn calls(&self, sandbox: &str) -> Result<Vec<String>> {
        Ok(self
            .all_calls()?
            .iter()
            .filter(|call| call.contains(sandbox))
            .map(|call| call.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect())
    }

    fn all_calls(&self) -> Result<Vec<String>> {
        let text = match fs::read_to_string(self.path("record/calls")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read?,
        };
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// What our plugin started and still runs, by where it was started.
    fn processes(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for pid in longshore_tests::host::pids()? {
            let place = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            if place.starts_with(self.dir.path()) {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                found.push(String::from_utf8_lossy(&command).replace('\0', " "));
            }
        }
        Ok(found)
    }

    /// What our plugin read last with this command.
    fn input(&self, plugin: &str, command: &str) -> Result<Value> {
        let path = self.path("record").join(format!("{plugin}-{command}.json"));
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    }

    fn environment(&self, plugin: &str, command: &str) -> Result<BTreeMap<String, String>> {
        let path = self.path("record").join(format!("{plugin}-{command}.env"));
        Ok(fs::read_to_string(path)?
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect())
    }
}

fn list(version: &str, plugins: Value) -> Value {
    json!({ "name": "testnet", "cniVersion": version, "plugins": plugins })
}

fn status_of(error: &anyhow::Error) -> Result<&tonic::Status> {
    error.downcast_ref::<tonic::Status>().context("a status")
}

/// Debian's plugins are there, and what they need of the host.
fn debian(test: &str, rules: bool) -> Result<bool> {
    if !Path::new(DEBIAN).join("bridge").exists() {
        skip(
            test,
            "the package containernetworking-plugins is not installed",
        );
        return Ok(false);
    }
    if rules {
        let probe = Machine::start()?;
        let masquerade = "-t nat -A POSTROUTING -m comment --comment probe -j MASQUERADE";
        for command in [
            &format!("iptables {masquerade}"),
            &format!("ip6tables {masquerade}"),
            "ip link add probe type ifb",
            "tc qdisc add dev probe root tbf rate 1mbit burst 10kb latency 25ms",
        ] {
            if let Err(error) = probe.output("sh", &["-c", command]) {
                let why = format!("the kernel lacks what plugins need: {error:#}");
                skip(test, &why);
                return Ok(false);
            }
        }
    }
    Ok(true)
}

async fn network_ready(bench: &mut Bench) -> Result<cri::RuntimeCondition> {
    let status = bench.runtime.status(cri::StatusRequest::default()).await?;
    status
        .into_inner()
        .status
        .unwrap_or_default()
        .conditions
        .into_iter()
        .find(|condition| condition.r#type == "NetworkReady")
        .context("a condition NetworkReady")
}

/// A page server in the pod, reached at this address from the host.
async fn serve(bench: &mut Bench, pod: &Pod) -> Result<String> {
    let toolbox = bench.toolbox.clone();
    let id = bench
        .launch(
            pod,
            container("page", &toolbox, &["page-server", "[::]:8080"]),
        )
        .await?;
    let log = bench.status(&id).await?.log_path;
    wait_for("the page server to serve", async || {
        Ok(fs::read_to_string(&log).is_ok_and(|text| text.contains("serving on")))
    })
    .await?;
    Ok(id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debians_chain_of_plugins_serves_pods_and_leaves_nothing() -> Result<()> {
    if !debian(
        "debians_chain_of_plugins_serves_pods_and_leaves_nothing",
        true,
    )? {
        return Ok(());
    }
    let folders = Folders::new()?;
    let plugins = json!([
        { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
          "capabilities": { "ips": true, "mac": true },
          "ipam": folders.pool(&["10.66.0.0/24", "fd66::/64"]) },
        { "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } },
        { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } },
        { "type": "bandwidth", "capabilities": { "bandwidth": true } },
        { "type": "firewall" },
    ]);
    let mut conf = list("1.0.0", plugins);
    // CHECK of Debian's portmap 1.1.1 looks for rules of families that the pod has not.
    conf["disableCheck"] = json!(true);
    folders.write("10-test.conflist", &conf)?;
    let mut bench = Bench::start_configured(&folders.config("auto", "")).await?;
    let wish = || {
        let mut config = pod("chained");
        config.port_mappings = vec![cri::PortMapping {
            container_port: 8080,
            host_port: 18080,
            ..Default::default()
        }];
        config.annotations = [
            ("kubernetes.io/ingress-bandwidth", "100M"),
            ("kubernetes.io/egress-bandwidth", "100M"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        config
    };
    // A bridge and the plugins' own chains stay once they were needed.
    let first = bench.run(wish()).await?;
    // The bridge plugin leaves the gateway's duplicate address detection to the kernel.
    let machine = bench.machine().clone();
    wait_for("the gateway's address", async || {
        let left = machine.output("ip", &["-6", "addr", "show", "tentative"])?;
        Ok(left.trim().is_empty())
    })
    .await?;
    bench.remove(&first).await?;
    bench.node.mark_clean()?;
    ensure!(folders.leases("testnet")?.is_empty());

    let pod = bench.run(wish()).await?;
    let addresses = bench.addresses(&pod).await?;
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    assert!(
        addresses[0].to_string().starts_with("10.66.0."),
        "{addresses:?}"
    );
    assert_eq!(
        folders.leases("testnet")?,
        [addresses[0].to_string(), addresses[1].to_string()]
    );
    let inside = serve(&mut bench, &pod).await?;
    for address in &addresses {
        let page = fetch_page(bench.machine(), SocketAddr::new(*address, 8080))?;
        assert!(page.contains("Hello from chained"), "{page}");
    }
    let page = fetch_page(bench.machine(), "127.0.0.1:18080".parse()?)?;
    assert!(page.contains("Hello from chained"), "{page}");
    let shown = bench
        .exec_ok(
            &inside,
            "cat /proc/sys/net/core/somaxconn; cat /etc/hosts; ip addr show lo",
        )
        .await?;
    assert!(shown.starts_with("500\n"), "{shown}");
    assert!(shown.contains(&addresses[0].to_string()), "{shown}");
    assert!(
        shown.contains("127.0.0.1/8") && shown.contains("UP"),
        "{shown}"
    );
    let shaping = bench.machine().output("tc", &["qdisc", "show"])?;
    assert!(
        shaping.contains("tbf") && shaping.contains("100Mbit"),
        "{shaping}"
    );
    bench.crash().await?;
    bench.node.fsck_clean().await?;
    assert_eq!(bench.addresses(&pod).await?, addresses);

    // Verbose answers show what readers look for.
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let info = bench
        .runtime
        .pod_sandbox_status(request)
        .await?
        .into_inner()
        .info;
    let info: Value = serde_json::from_str(&info["info"])?;
    let ip = &info["cniResult"]["Interfaces"]["eth0"]["IPConfigs"][0]["IP"];
    assert_eq!(*ip, json!(addresses[0].to_string()), "{info}");
    let status = bench
        .runtime
        .status(cri::StatusRequest { verbose: true })
        .await?;
    let info = status.into_inner().info;
    let config: Value = serde_json::from_str(&info["cniconfig"])?;
    assert_eq!(config["Networks"][0]["Config"]["Name"], "testnet");
    assert_eq!(info["lastCNILoadStatus"], "OK");

    // A configuration that is gone does not keep its pods.
    folders.remove("10-test.conflist")?;
    bench.remove(&pod).await?;
    ensure!(folders.leases("testnet")?.is_empty());
    bench.node.expect_clean()?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_in_the_middle_of_plugins_leaves_all_or_nothing() -> Result<()> {
    if !debian(
        "a_kill_in_the_middle_of_plugins_leaves_all_or_nothing",
        true,
    )? {
        return Ok(());
    }
    let folders = Folders::new()?;
    let plugins = json!([
        { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
          "ipam": folders.pool(&["10.66.0.0/24"]) },
        { "type": "portmap", "capabilities": { "portMappings": true } },
        { "type": "firewall" },
    ]);
    let mut conf = list("0.4.0", plugins);
    conf["disableCheck"] = json!(true);
    folders.write("10-test.conflist", &conf)?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let mut config = pod("middle");
    config.log_directory = bench.node.log_dir().to_string_lossy().into_owned();
    config.port_mappings = vec![cri::PortMapping {
        container_port: 8080,
        host_port: 18080,
        ..Default::default()
    }];
    let first = bench.run(config.clone()).await?;
    bench.remove(&first).await?;
    bench.node.mark_clean()?;
    // Delays spread over the time that ADD and DEL take, so that each plugin is hit some day.
    for round in 0..10_u64 {
        let mut runtime = bench.runtime.clone();
        let config = config.clone();
        let work = tokio::spawn(async move {
            let request = cri::RunPodSandboxRequest {
                config: Some(config),
                ..Default::default()
            };
            let pod_sandbox_id = runtime
                .run_pod_sandbox(request)
                .await?
                .into_inner()
                .pod_sandbox_id;
            let request = cri::StopPodSandboxRequest { pod_sandbox_id };
            runtime.stop_pod_sandbox(request).await
        });
        tokio::time::sleep(Duration::from_millis(10 + 40 * round)).await;
        bench.crash().await?;
        let _cut_off = work.await?;
        bench
            .node
            .fsck_clean()
            .await
            .with_context(|| format!("round {round}"))?;
        let pods = bench
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
        for item in pods.into_inner().items {
            let pod = Pod {
                id: item.id,
                config: cri::PodSandboxConfig::default(),
            };
            bench.remove(&pod).await?;
        }
        bench
            .node
            .expect_clean()
            .with_context(|| format!("round {round}"))?;
        ensure!(folders.leases("testnet")?.is_empty(), "round {round}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ptp_and_macvlan_serve_pods_too() -> Result<()> {
    if !debian("ptp_and_macvlan_serve_pods_too", false)? {
        return Ok(());
    }
    let folders = Folders::new()?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let add = ["link", "add", "uplink", "type", "bridge"];
    bench.machine().output("ip", &add)?;
    bench
        .machine()
        .output("ip", &["link", "set", "uplink", "up"])?;
    bench.node.mark_clean()?;
    let ptp = json!({ "name": "testnet", "cniVersion": "0.4.0", "type": "ptp",
        "ipam": folders.pool(&["10.67.0.0/24", "fd67::/64"]) });
    folders.write("20-ptp.conf", &ptp)?;
    let macvlan = json!({ "name": "othernet", "cniVersion": "0.3.1", "type": "macvlan",
        "master": "uplink", "mode": "bridge", "ipam": folders.pool(&["10.68.0.0/24"]) });
    folders.write("30-macvlan.json", &macvlan)?;
    // That the host forwards stays once it was needed.
    let first = bench.run(pod("by-ptp")).await?;
    bench.remove(&first).await?;
    bench.node.mark_clean()?;
    let first = bench.run(pod("by-ptp")).await?;
    let addresses = bench.addresses(&first).await?;
    assert!(
        addresses.len() == 2 && addresses[0].is_ipv4() && addresses[1].is_ipv6(),
        "{addresses:?}"
    );
    serve(&mut bench, &first).await?;
    for address in addresses.clone() {
        // The plugin does not wait until its end of the link may use its IPv6 address.
        wait_for("the pod to be reached", async || {
            let page = fetch_page(bench.machine(), SocketAddr::new(address, 8080));
            Ok(page.is_ok_and(|page| page.contains("Hello from by-ptp")))
        })
        .await?;
    }
    // The next one by name serves the pods after it.
    folders.remove("20-ptp.conf")?;
    let modes = bench.machine().output(
        "sh",
        &[
            "-c",
            "ip link add probe link uplink type macvlan mode bridge && ip link del probe",
        ],
    );
    if let Err(error) = modes {
        skip(
            "ptp_and_macvlan_serve_pods_too",
            &format!("no macvlan: {error:#}"),
        );
        return bench.finish().await;
    }
    let second = bench.run(pod("by-macvlan")).await?;
    let third = bench.run(pod("by-macvlan")).await?;
    let address = bench.addresses(&second).await?[0];
    assert!(address.to_string().starts_with("10.68.0."), "{address}");
    serve(&mut bench, &second).await?;
    let place = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&third.id)
        .join("ns/net");
    let fetcher = longshore_tests::page_server()?;
    let page = bench.machine().output(
        "nsenter",
        &[
            &format!("--net={}", place.display()),
            &fetcher.to_string_lossy(),
            "--fetch",
            &format!("{address}:8080"),
        ],
    )?;
    assert!(page.contains("Hello from by-macvlan"), "{page}");
    bench.node.fsck_clean().await?;
    bench.crash().await?;
    bench.node.fsck_clean().await?;
    // What is changed by hand is told by the plugins.
    let place = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&first.id)
        .join("ns/net");
    let place = format!("--net={}", place.display());
    let address = format!("{}/24", addresses[0]);
    bench.machine().output(
        "nsenter",
        &[&place, "ip", "addr", "del", &address, "dev", "eth0"],
    )?;
    let found = bench.node.fsck().await?;
    assert!(
        found.len() == 1 && found[0].contains(&first.id),
        "{found:?}"
    );
    for pod in [first, second, third] {
        bench.remove(&pod).await?;
    }
    for network in ["testnet", "othernet"] {
        ensure!(folders.leases(network)?.is_empty(), "{network}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plugins_are_told_what_the_pod_asks_for_and_answer_its_addresses() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    let capabilities = json!({ "portMappings": true, "bandwidth": true, "dns": true, "ips": true,
        "mac": true, "cgroupPath": true });
    let plugins = json!([{ "type": "ours", "capabilities": capabilities, "own": 7 }]);
    folders.write("10-test.conflist", &list("1.1.0", plugins))?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let mut config = pod("told");
    config.port_mappings = vec![
        cri::PortMapping {
            protocol: cri::Protocol::Udp.into(),
            container_port: 53,
            host_port: 5353,
            host_ip: "127.0.0.1".to_owned(),
        },
        cri::PortMapping {
            container_port: 80,
            ..Default::default()
        },
    ];
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.0.0.2".to_owned()],
        searches: vec!["example.org".to_owned()],
        options: Vec::new(),
    });
    config.annotations = [
        ("kubernetes.io/ingress-bandwidth", "1M"),
        ("cni.longshore/ips", "10.9.0.5"),
        ("cni.longshore/mac", "02:00:00:00:00:07"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let pod = bench.run(config.clone()).await?;
    let addresses: Vec<_> = bench
        .addresses(&pod)
        .await?
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(addresses, ["10.9.0.5", "fd09::5", "10.9.1.5"], "IPv4 first");
    let mut input = folders.input("ours", "ADD")?;
    let cgroup = input["runtimeConfig"]["cgroupPath"].take();
    assert!(
        cgroup.as_str().is_some_and(|path| path.ends_with(&pod.id)),
        "{cgroup}"
    );
    assert_eq!(
        input,
        json!({ "type": "ours", "name": "testnet", "cniVersion": "1.1.0", "own": 7,
            "runtimeConfig": {
                "portMappings": [{ "hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" }],
                "bandwidth": { "ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u32 },
                "dns": { "servers": ["10.0.0.2"], "searches": ["example.org"], "options": [] },
                "ips": ["10.9.0.5"],
                "mac": "02:00:00:00:00:07",
                "cgroupPath": null,
            } })
    );
    let netns = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&pod.id)
        .join("ns/net");
    let netns = netns.to_string_lossy().into_owned();
    let environment = folders.environment("ours", "ADD")?;
    let uid = config.metadata.clone().unwrap_or_default().uid;
    for (key, value) in [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", &pod.id),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", "eth0"),
        (
            "CNI_ARGS",
            &format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=tests;K8S_POD_NAME=told;K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={uid}",
                pod.id
            ),
        ),
        (
            "CNI_PATH",
            &format!("{}:{DEBIAN}", folders.path("bin").display()),
        ),
    ] {
        assert_eq!(
            environment.get(key).map(String::as_str),
            Some(value),
            "{key}"
        );
    }
    // Another agent and another configuration: DEL is told what ADD was.
    folders.remove("10-test.conflist")?;
    bench.crash().await?;
    bench.node.fsck_clean().await?;
    let check = folders.input("ours", "CHECK")?;
    assert_eq!(check["prevResult"]["ips"][1]["address"], "10.9.0.5/24");
    bench.stop(&pod).await?;
    bench.stop(&pod).await?;
    let del = folders.input("ours", "DEL")?;
    assert_eq!(del["prevResult"], check["prevResult"]);
    assert_eq!(del["runtimeConfig"]["ips"], json!(["10.9.0.5"]));
    assert_eq!(
        folders.calls(&pod.id)?,
        ["ADD ours", "CHECK ours", "DEL ours"]
    );
    // A name that would be read as more arguments is refused.
    folders.write(
        "10-test.conflist",
        &list("1.1.0", json!([{ "type": "ours" }])),
    )?;
    let mut config = longshore_tests::pods::pod("a;K8S_POD_NAMESPACE=kube-system");
    config.hostname.clear();
    let error = bench.run(config).await.expect_err("refused");
    assert_eq!(status_of(&error)?.code(), Code::InvalidArgument, "{error}");
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_fails_is_named_and_all_are_undone() -> Result<()> {
    let folders = Folders::new()?;
    for name in ["first", "second", "third"] {
        folders.plugin(name)?;
    }
    let plugins = json!([{ "type": "first" }, { "type": "second" }, { "type": "third" }]);
    folders.write("10-test.conflist", &list("1.0.0", plugins))?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let object = r#"echo '{"cniVersion":"1.0.0","code":137,"msg":"no more room","details":"pool 7"}'; exit 1"#;
    let flood = "head -c 3000000 /dev/zero | tr '\\0' x";
    for (script, code, words) in [
        (object, Code::Internal, ["code 137", "no more room: pool 7"]),
        (
            r#"echo '{"code":11,"msg":"later"}'; exit 1"#,
            Code::Unavailable,
            ["code 11", "later"],
        ),
        (
            "echo oh no >&2; exit 3",
            Code::Internal,
            ["exit status: 3", "oh no"],
        ),
        (
            "kill -9 $$",
            Code::Internal,
            ["signal: 9", "no error object"],
        ),
        ("echo done", Code::Internal, ["answered ADD", "no JSON"]),
        ("exit 0", Code::Internal, ["answered ADD", "no result"]),
        (
            r#"echo '{"cniVersion":"0.2.0"}'"#,
            Code::Internal,
            ["\"0.2.0\"", "1.0.0"],
        ),
        (
            r#"echo '{"ips":[{"address":"10.0.0.1"}]}'"#,
            Code::Internal,
            ["\"10.0.0.1\"", "prefix"],
        ),
        (
            flood,
            Code::Internal,
            ["answered ADD", "more than 1048576 bytes"],
        ),
    ] {
        fs::write(folders.path("record/calls"), "")?;
        folders.on("second", "ADD", Some(script))?;
        // The same name each time: it is free again.
        let mut config = pod("failing");
        config.metadata = Some(cri::PodSandboxMetadata {
            name: "failing".to_owned(),
            uid: "one".to_owned(),
            namespace: "tests".to_owned(),
            attempt: 0,
        });
        let error = bench.run(config).await.expect_err("the plugin fails");
        let status = status_of(&error)?;
        assert_eq!(status.code(), code, "{script}: {status:?}");
        for word in words.iter().chain(&["\"second\"", "\"testnet\""]) {
            assert!(
                status.message().contains(word),
                "{script}: {}",
                status.message()
            );
        }
        let calls: Vec<_> = folders
            .all_calls()?
            .iter()
            .map(|call| call.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            calls,
            [
                "ADD first",
                "ADD second",
                "DEL third",
                "DEL second",
                "DEL first"
            ],
            "{script}"
        );
        // What the first one made is told to those that undo.
        let told = folders.input("first", "DEL")?;
        assert_eq!(
            told["prevResult"]["ips"][0]["address"], "fd09::5/64",
            "{told}"
        );
        bench.node.expect_clean()?;
    }
    folders.on("second", "ADD", None)?;
    fs::write(folders.path("record/calls"), "")?;
    let pod = bench.run(pod("works")).await?;
    assert_eq!(
        folders.calls(&pod.id)?,
        ["ADD first", "ADD second", "ADD third"]
    );
    // A failure before the plugins' turn leaves nothing for them.
    let mut config = longshore_tests::pods::pod("early");
    let sysctls = &mut config.linux.get_or_insert_default().sysctls;
    sysctls.insert("net.ipv4.not_there".to_owned(), "1".to_owned());
    bench.run(config).await.expect_err("no such setting");
    assert_eq!(folders.all_calls()?.len(), 3);
    bench.node.fsck_clean().await?;
    // Not one of a list runs that is not all there.
    fs::remove_file(folders.path("bin/third"))?;
    let error = bench
        .run(longshore_tests::pods::pod("lacks"))
        .await
        .expect_err("missing");
    let status = status_of(&error)?;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("\"third\""), "{status:?}");
    let ready = network_ready(&mut bench).await?;
    assert!(
        !ready.status && ready.message.contains("\"third\""),
        "{ready:?}"
    );
    folders.plugin("third")?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detachment_that_fails_is_tried_again_until_it_works() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    folders.write(
        "10-test.conflist",
        &list("1.0.0", json!([{ "type": "ours" }])),
    )?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let pod = bench.run(pod("stays")).await?;
    folders.on("ours", "DEL", Some("echo busy >&2; exit 1"))?;
    for _ in 0..2 {
        let error = bench.stop(&pod).await.expect_err("DEL fails");
        let status = status_of(&error)?;
        assert!(status.message().contains("busy"), "{status:?}");
        assert_eq!(
            bench.pod_status(&pod).await?.state(),
            cri::PodSandboxState::SandboxNotready
        );
    }
    let request = cri::RemovePodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    bench
        .runtime
        .remove_pod_sandbox(request)
        .await
        .expect_err("DEL fails");
    bench.crash().await?;
    folders.on("ours", "DEL", None)?;
    bench.remove(&pod).await?;
    bench.node.expect_clean()?;
    // When neither ADD nor DEL work, the caller learns it at once and nothing holds the name.
    folders.on("ours", "ADD", Some("echo never >&2; exit 1"))?;
    folders.on("ours", "DEL", Some("echo nor this >&2; exit 1"))?;
    let config = longshore_tests::pods::pod("neither");
    for _ in 0..2 {
        let error = bench.run(config.clone()).await.expect_err("ADD fails");
        assert!(status_of(&error)?.message().contains("never"), "{error}");
    }
    let found = bench.node.fsck().await?;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found
            .iter()
            .all(|one| one.contains("LEFTOVER CNI attachment")),
        "{found:?}"
    );
    // A new agent goes on with it.
    bench.crash().await?;
    folders.on("ours", "ADD", None)?;
    folders.on("ours", "DEL", None)?;
    wait_for("DEL in the background", async || {
        Ok(bench.node.fsck().await?.is_empty())
    })
    .await?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_hangs_holds_its_own_pod_and_is_killed_in_time() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    folders.write(
        "10-test.conflist",
        &list("1.0.0", json!([{ "type": "ours" }])),
    )?;
    let mut bench = Bench::start_configured(&folders.config("cni", "timeout = \"10s\"")).await?;
    // What it started goes with it, also what left its process group.
    let hang = r#"case "$CNI_ARGS" in *=hangs*) touch hanging; setsid sleep 1001 & sleep 1002;; esac
echo '{"ips":[{"address":"10.9.0.6/24"}]}'"#;
    folders.on("ours", "ADD", Some(hang))?;
    let mut runtime = bench.runtime.clone();
    let mut config = pod("hangs");
    config.log_directory = bench.node.log_dir().to_string_lossy().into_owned();
    let hanging = tokio::spawn(async move {
        let began = Instant::now();
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            ..Default::default()
        };
        (runtime.run_pod_sandbox(request).await, began.elapsed())
    });
    wait_for("the plugin to hang", async || {
        Ok(folders.path("record/hanging").exists())
    })
    .await?;
    let operations = OperationServiceClient::new(bench.node.channel())
        .list_operations(api::ListOperationsRequest::default())
        .await?
        .into_inner()
        .operations;
    let stages: Vec<_> = operations.iter().map(|one| one.stage.as_str()).collect();
    assert!(
        stages.contains(&"CNI ADD ours of network testnet"),
        "{stages:?}"
    );
    let other = bench.run(pod("passes")).await?;
    assert_eq!(bench.addresses(&other).await?[0].to_string(), "10.9.0.6");
    bench.remove(&other).await?;
    let (result, took) = hanging.await?;
    let status = result.expect_err("killed");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(
        status.message().contains("\"ours\"") && took < Duration::from_secs(100),
        "{status:?} after {took:?}"
    );
    assert_eq!(folders.processes()?, Vec::<String>::new());
    bench.node.expect_clean()?;
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_of_a_killed_agent_is_ended_and_undone() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("first")?;
    folders.plugin("second")?;
    let plugins = json!([{ "type": "first" }, { "type": "second" }]);
    folders.write("10-test.conflist", &list("1.0.0", plugins))?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    for (round, plugin) in ["first", "second"].into_iter().enumerate() {
        fs::write(folders.path("record/calls"), "")?;
        let hang = "touch hanging; setsid sleep 1003 & sleep 1004; touch lived-on";
        folders.on(plugin, "ADD", Some(hang))?;
        let mut runtime = bench.runtime.clone();
        let mut config = pod("cut-off");
        config.log_directory = bench.node.log_dir().to_string_lossy().into_owned();
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            ..Default::default()
        };
        let cut_off = tokio::spawn(async move { runtime.run_pod_sandbox(request).await });
        wait_for("the plugin to hang", async || {
            Ok(folders.path("record/hanging").exists())
        })
        .await?;
        fs::remove_file(folders.path("record/hanging"))?;
        bench.crash().await?;
        cut_off.await?.expect_err("the agent died");
        assert_eq!(folders.processes()?, Vec::<String>::new());
        let calls: Vec<_> = folders
            .all_calls()?
            .iter()
            .map(|call| call.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        let expected: &[&str] = match plugin {
            "first" => &["ADD first", "DEL second", "DEL first"],
            _ => &["ADD first", "ADD second", "DEL second", "DEL first"],
        };
        assert_eq!(calls, expected, "round {round}");
        // What had answered before is known to the next agent.
        let told = folders.input("first", "DEL")?;
        assert_eq!(
            told.get("prevResult").is_some(),
            plugin == "second",
            "{told}"
        );
        bench.node.expect_clean()?;
        folders.on(plugin, "ADD", None)?;
    }
    ensure!(!folders.path("record/lived-on").exists());
    // In DEL, too.
    let pod = bench.run(pod("cut-off")).await?;
    folders.on(
        "second",
        "DEL",
        Some("touch hanging; sleep 1004; touch lived-on"),
    )?;
    let mut runtime = bench.runtime.clone();
    let request = cri::StopPodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let cut_off = tokio::spawn(async move { runtime.stop_pod_sandbox(request).await });
    wait_for("the plugin to hang", async || {
        Ok(folders.path("record/hanging").exists())
    })
    .await?;
    bench.node.kill()?;
    cut_off.await?.expect_err("the agent died");
    folders.on("second", "DEL", None)?;
    bench.node.launch().await?;
    bench.reconnect();
    assert_eq!(folders.processes()?, Vec::<String>::new());
    // The stop was finished before anything was served.
    assert_eq!(
        folders.calls(&pod.id)?,
        [
            "ADD first",
            "ADD second",
            "DEL second",
            "DEL second",
            "DEL first"
        ]
    );
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_namespace_is_gone_is_detached_without_it() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    folders.write(
        "10-test.conflist",
        &list("0.4.0", json!([{ "type": "ours" }])),
    )?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let pod = bench.run(pod("gone")).await?;
    bench.node.kill()?;
    // As after a reboot: neither a shim nor a namespace.
    for pid in bench.node.scope().pids()? {
        bench.machine().output("kill", &["-9", &pid.to_string()])?;
    }
    let place = bench
        .node
        .run_dir()
        .join("sandboxes")
        .join(&pod.id)
        .join("ns/net");
    bench
        .machine()
        .output("umount", &["-l", &place.to_string_lossy()])?;
    bench.node.launch().await?;
    bench.reconnect();
    bench.remove(&pod).await?;
    let environment = folders.environment("ours", "DEL")?;
    assert_eq!(environment["CNI_NETNS"], "");
    let told = folders.input("ours", "DEL")?;
    // In the words of the version that it speaks.
    assert_eq!(told["prevResult"]["ips"][0]["version"], "6", "{told}");
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_says_whether_its_network_is_ready_and_notices_changes() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    let mut bench = Bench::start_configured(&folders.config("cni", "")).await?;
    let folder = folders.path("net.d").to_string_lossy().into_owned();
    let ready = network_ready(&mut bench).await?;
    assert!(!ready.status, "{ready:?}");
    assert_eq!(ready.reason, "NetworkPluginNotReady");
    assert!(ready.message.contains(&folder), "{ready:?}");
    let error = bench.run(pod("early")).await.expect_err("no network");
    assert_eq!(status_of(&error)?.code(), Code::Unavailable, "{error}");
    // The kubelet starts these all the same.
    bench.run(host_network_pod("host")).await?;
    fs::write(folders.path("net.d/10-broken.conflist"), "{")?;
    let ready = network_ready(&mut bench).await?;
    assert!(
        !ready.status && ready.message.contains("10-broken.conflist is no JSON"),
        "{ready:?}"
    );
    folders.write(
        "20-test.conflist",
        &list("1.1.0", json!([{ "type": "ours" }])),
    )?;
    let ready = network_ready(&mut bench).await?;
    assert!(ready.status && ready.reason.is_empty(), "{ready:?}");
    assert_eq!(folders.input("ours", "STATUS")?["name"], "testnet");
    let pod = bench.run(pod("late")).await?;
    assert_eq!(bench.addresses(&pod).await?.len(), 3);
    let networks = NetworkServiceClient::new(bench.node.channel())
        .list_networks(api::ListNetworksRequest::default())
        .await?
        .into_inner()
        .networks;
    let shown: Vec<_> = networks
        .iter()
        .filter_map(|network| {
            Some((
                network.name.as_str(),
                network.cni.as_ref()?,
                network.lease_count,
            ))
        })
        .collect();
    assert!(
        matches!(&shown[..], [("testnet", cni, 1)] if cni.plugins == ["ours"] && cni.version == "1.1.0"),
        "{networks:?}"
    );
    // What an operator is told before anything runs.
    let said = check(&bench)?;
    assert!(said.contains("10-broken.conflist is passed over"), "{said}");
    assert!(
        said.contains("attached by the CNI network \"testnet\""),
        "{said}"
    );
    fs::rename(folders.path("bin/ours"), folders.path("bin/away"))?;
    let said = check(&bench)?;
    assert!(
        said.contains("error   network: CNI plugin \"ours\" of network \"testnet\""),
        "{said}"
    );
    fs::rename(folders.path("bin/away"), folders.path("bin/ours"))?;
    // Plugins may say that they can't serve; what runs is not touched.
    let not_now = r#"echo '{"cniVersion":"1.1.0","code":50,"msg":"no daemon"}'; exit 1"#;
    folders.on("ours", "STATUS", Some(not_now))?;
    let mut ready = network_ready(&mut bench).await?;
    let end = Instant::now() + Duration::from_secs(30);
    while ready.status && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(200)).await;
        ready = network_ready(&mut bench).await?;
    }
    assert!(
        !ready.status && ready.message.contains("code 50: no daemon"),
        "{ready:?}"
    );
    bench.finish().await
}

/// What `longshored check` prints.
fn check(bench: &Bench) -> Result<String> {
    let mut command = Command::new(longshore_tests::program("longshored")?);
    command
        .arg("--config")
        .arg(bench.node.dir().join("longshored.toml"))
        .arg("check");
    let output = bench.machine().run(move || command.output())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_built_in_network_serves_until_a_configuration_is_there() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    let mut bench = Bench::start_configured(&folders.config("auto", "")).await?;
    ensure!(network_ready(&mut bench).await?.status);
    let built_in = bench.run(pod("built-in")).await?;
    assert!(
        bench.addresses(&built_in).await?[0]
            .to_string()
            .starts_with("10.")
    );
    folders.write(
        "10-test.conflist",
        &list("1.0.0", json!([{ "type": "ours" }])),
    )?;
    let by_plugins = bench.run(pod("by-plugins")).await?;
    assert_eq!(
        bench.addresses(&by_plugins).await?[0].to_string(),
        "10.9.0.5"
    );
    // Both live on over a restart, and both are taken down.
    bench.crash().await?;
    serve(&mut bench, &built_in).await?;
    let address = bench.addresses(&built_in).await?[0];
    let page = fetch_page(bench.machine(), SocketAddr::new(address, 8080))?;
    assert!(page.contains("Hello from built-in"), "{page}");
    bench.node.fsck_clean().await?;
    // None that can be used is not none: pods do not end up in another network than was meant.
    folders.write("10-test.conflist", &json!({}))?;
    ensure!(!network_ready(&mut bench).await?.status);
    let error = bench.run(pod("nowhere")).await.expect_err("broken");
    assert!(
        status_of(&error)?.message().contains("10-test.conflist"),
        "{error}"
    );
    folders.remove("10-test.conflist")?;
    ensure!(network_ready(&mut bench).await?.status);
    let again = bench.run(pod("again")).await?;
    assert!(
        bench.addresses(&again).await?[0]
            .to_string()
            .starts_with("10.")
    );
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_collected_where_it_is_asked_for() -> Result<()> {
    let folders = Folders::new()?;
    folders.plugin("ours")?;
    folders.write(
        "10-test.conflist",
        &list("1.1.0", json!([{ "type": "ours" }])),
    )?;
    let mut bench = Bench::start_configured(&folders.config("auto", "gc = true")).await?;
    let told = folders.input("ours", "GC")?;
    assert_eq!(told["cni.dev/valid-attachments"], json!([]));
    let pod = bench.run(pod("valid")).await?;
    bench.crash().await?;
    let told = folders.input("ours", "GC")?;
    assert_eq!(
        told["cni.dev/valid-attachments"],
        json!([{ "containerID": pod.id, "ifname": "eth0" }])
    );
    bench.finish().await
}
