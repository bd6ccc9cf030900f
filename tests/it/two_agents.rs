//! Two agents on one host: each has its own, and neither touches the other's.

use anyhow::Result;
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    images,
    machine::{Machine, fetch_page},
    node::{Node, Options},
    pods::{Bench, Pod, container, pod},
    registry::Registry,
};

async fn bench_on(machine: &Machine) -> Result<Bench> {
    let node = Node::start_with(Options {
        machine: Some(machine.clone()),
        ..Default::default()
    })
    .await?;
    let registry = Registry::start(machine.listen("127.0.0.1:0")?)?;
    registry.push("toolbox:1", &images::toolbox()?);
    let mut bench = Bench {
        toolbox: registry.reference("toolbox:1"),
        runtime: node.runtime(),
        images: node.images(),
        node,
        registry,
    };
    let reference = bench.toolbox.clone();
    bench.pull(&reference).await?;
    Ok(bench)
}

async fn page(bench: &mut Bench, name: &str) -> Result<(Pod, String)> {
    let pod = bench.run(pod(name)).await?;
    let toolbox = bench.toolbox.clone();
    let id = bench
        .launch(&pod, container("page", &toolbox, &["page-server"]))
        .await?;
    Ok((pod, id))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_side_by_side_leave_each_other_alone() -> Result<()> {
    let machine = Machine::start()?;
    let mut first = bench_on(&machine).await?;
    let mut second = bench_on(&machine).await?;
    assert_ne!(first.node.instance(), second.node.instance());
    first.node.mark_clean()?;
    second.node.mark_clean()?;
    let (one, in_one) = page(&mut first, "same-name").await?;
    let (two, in_two) = page(&mut second, "same-name").await?;
    let (of_one, of_two) = (first.addresses(&one).await?, second.addresses(&two).await?);
    assert!(
        of_one.iter().all(|address| !of_two.contains(address)),
        "{of_one:?} {of_two:?}"
    );
    // Neither sees the other's, finds fault with it, or takes it down when it recovers.
    for bench in [&mut first, &mut second] {
        let pods = bench
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
        assert_eq!(pods.into_inner().items.len(), 1);
        bench.node.fsck_clean().await?;
    }
    first.crash().await?;
    second.node.fsck_clean().await?;
    for (bench, id, addresses) in [
        (&mut first, &in_one, &of_one),
        (&mut second, &in_two, &of_two),
    ] {
        assert_eq!(bench.exec_ok(id, "echo fine").await?, "fine\n");
        let target = std::net::SocketAddr::new(addresses[0], 8080);
        longshore_tests::pods::wait_for("the page", async || {
            Ok(fetch_page(&machine, target).is_ok())
        })
        .await?;
    }
    first.remove(&one).await?;
    assert_eq!(second.exec_ok(&in_two, "echo fine").await?, "fine\n");
    let target = std::net::SocketAddr::new(of_two[0], 8080);
    assert!(fetch_page(&machine, target)?.contains("Hello"));
    second.remove(&two).await?;
    // Links, rules and routes are the machine's: both are compared once both have nothing left.
    first.node.expect_clean()?;
    second.node.expect_clean()?;
    second.finish().await?;
    // An agent without pods takes its network down as it ends, and only that.
    first.node.fsck_clean().await?;
    first.node.mark_clean()?;
    first.finish().await
}
