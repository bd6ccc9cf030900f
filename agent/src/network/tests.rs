//! The kernel's side, in network namespaces of its own: a host, its sandboxes, and a world.
//!
//! Every namespace is held by a thread that lives as long as the test and runs what it is sent.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    any::Any,
    collections::BTreeSet,
    fs::File,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use rustix::thread::gettid;

use super::{
    bridge,
    netlink::{self, Netlink, in_netns},
    plan::HostFacts,
    *,
};

const WAIT: Duration = Duration::from_secs(2);

type Work = Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>;

/// A network namespace, and a thread in it.
struct Space {
    work: mpsc::Sender<(Work, mpsc::Sender<Box<dyn Any + Send>>)>,
    path: PathBuf,
}

impl Space {
    fn new() -> Self {
        let (work, todo) = mpsc::channel::<(Work, mpsc::Sender<Box<dyn Any + Send>>)>();
        let (ready, path) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests run as root");
            let tid = gettid().as_raw_nonzero();
            ready
                .send(PathBuf::from(format!("/proc/self/task/{tid}/ns/net")))
                .unwrap();
            for (work, done) in todo {
                let _ = done.send(work());
            }
        });
        let path = path.recv().unwrap();
        let space = Self { work, path };
        space.run(|| {
            let mut netlink = Netlink::open().unwrap();
            netlink.apply(vec![netlink::set_up("lo")]).unwrap();
        });
        space
    }

    /// Runs `work` in the namespace and waits for it; a panic there is one here.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let work: Work = Box::new(move || Box::new(work()));
        self.work.send((work, done)).unwrap();
        let result = result.recv().expect("the work panicked");
        *result.downcast().unwrap()
    }

    /// A TCP server that answers each connection with the peer's address.
    fn serve(&self, port: u16) {
        self.run(move || {
            for any in ["0.0.0.0", "::"] {
                let ip: IpAddr = any.parse().unwrap();
                let listener = match rustix_listener((ip, port).into()) {
                    Some(listener) => listener,
                    None => continue,
                };
                thread::spawn(move || {
                    for stream in listener.incoming() {
                        let mut stream = stream.unwrap();
                        let peer = stream.peer_addr().unwrap().ip();
                        let _ = write!(stream, "{peer}");
                    }
                });
            }
        });
    }

    /// The address that a TCP server there sees us come from.
    fn ask(&self, to: &str) -> Option<String> {
        let to: SocketAddr = to.parse().unwrap();
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&to, WAIT).ok()?;
            stream.set_read_timeout(Some(WAIT)).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            Some(answer)
        })
    }

    fn sysctl(&self, name: &'static str, value: &'static str) {
        self.run(move || std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap());
    }

    /// Everything that we could leave behind here. Link-local addresses come and go with the
    /// carrier of a bridge, and belong to the kernel.
    fn state(&self) -> BTreeSet<String> {
        self.run(|| {
            let mut netlink = Netlink::open().unwrap();
            let link_local: IpNet = "fe80::/10".parse().unwrap();
            let start = Instant::now();
            loop {
                let routes = netlink.routes().unwrap();
                let mut state = BTreeSet::from([ruleset()]);
                let mut complete = true;
                for link in netlink.links().unwrap() {
                    for address in netlink.addresses(link.index).unwrap() {
                        if !link_local.contains(&address) {
                            let itself = IpNet::from(address.addr());
                            complete &= routes.iter().any(|route| route.destination == itself);
                            state.insert(format!("address {address} of {}", link.name));
                        }
                    }
                    state.insert(format!("link {} {:?}", link.name, link.alias));
                }
                // The route to an IPv6 address follows it on a work queue.
                if complete || start.elapsed() > WAIT {
                    let routes = routes.iter();
                    let routes = routes.filter(|route| !link_local.contains(&route.destination));
                    state.extend(routes.map(|route| format!("route {route:?}")));
                    return state;
                }
                thread::sleep(Duration::from_millis(1));
            }
        })
    }
}

fn difference(one: &BTreeSet<String>, other: &BTreeSet<String>) -> Vec<String> {
    one.symmetric_difference(other).cloned().collect()
}

/// Listening on `::` only for IPv6, so that both families can have the port.
fn rustix_listener(at: SocketAddr) -> Option<TcpListener> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).ok()?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true).ok()?;
    }
    bind(&socket, &at).ok()?;
    listen(&socket, 64).ok()?;
    Some(socket.into())
}

fn ruleset() -> String {
    let output = Command::new("nft").arg("list").arg("ruleset").output();
    let output = output.expect("nft is installed on test machines");
    String::from_utf8(output.stdout).unwrap()
}

/// A host with networks.
struct Host {
    space: Space,
    instance: InstanceId,
    /// Used only by the thread in the namespace.
    nft: Arc<Nft>,
    network: Network,
    facts: HostFacts,
}

impl Host {
    fn new() -> Self {
        Self::with(true)
    }

    fn with(ipv6: bool) -> Self {
        let space = Space::new();
        if !ipv6 {
            space.sysctl("ipv6/conf/all/disable_ipv6", "1");
        }
        let instance = InstanceId::random();
        let asked = instance.clone();
        let (network, facts) = space.run(move || {
            let config = NetworkChapterConfig::default();
            let host = host::Host::read(&mut Netlink::open().unwrap(), &config).unwrap();
            let network = config.choose(&asked, None, |_| true).unwrap();
            host::prepare(&host).unwrap();
            (network, host.facts)
        });
        assert_eq!(facts.ipv6, ipv6);
        Self {
            space,
            nft: Arc::new(Nft::new(&instance)),
            instance,
            network,
            facts,
        }
    }

    fn rebuild(&self, live: &[(SandboxId, NetworkPlan)]) {
        let (instance, network, facts) = (self.instance.clone(), self.network.clone(), self.facts);
        let (live, nft) = (live.to_vec(), Arc::clone(&self.nft));
        self.space.run(move || {
            bridge::rebuild(&instance, &nft, &[network], facts, &live).unwrap();
        });
    }

    fn plan(&self, number: u32, ports: &[PortMapping]) -> (SandboxId, NetworkPlan) {
        let wish = SandboxNetwork {
            ports: ports.to_vec(),
            ..SandboxNetwork::default()
        };
        // The first digits of the id choose the address.
        let random = SandboxId::random();
        let id = format!("{number:08x}{}", &random.as_str()[8..]);
        let id: SandboxId = id.parse().unwrap();
        let claims = std::collections::BTreeMap::new();
        let plan = plan::plan(&claims, &self.network, self.facts, &id, &wish).unwrap();
        (id, plan)
    }

    fn try_attach(
        &self,
        id: &SandboxId,
        plan: &NetworkPlan,
        space: &Space,
    ) -> Result<Attachment, NetworkError> {
        let (instance, id, plan) = (self.instance.clone(), id.clone(), plan.clone());
        let (netns, nft) = (space.path.clone(), Arc::clone(&self.nft));
        self.space
            .run(move || bridge::attach(&instance, &nft, &id, &plan, &netns))
    }

    fn sandbox(&self, number: u32, ports: &[PortMapping]) -> Sandbox {
        let space = Space::new();
        let (id, plan) = self.plan(number, ports);
        let attachment = self.try_attach(&id, &plan, &space).unwrap();
        Sandbox {
            space,
            id,
            plan,
            attachment,
        }
    }

    fn detach(&self, id: &SandboxId) {
        let (nft, id) = (Arc::clone(&self.nft), id.clone());
        self.space.run(move || bridge::detach(&nft, &id).unwrap());
    }

    /// Ends the sandbox as a stop does.
    fn end(&self, sandbox: Sandbox) {
        self.detach(&sandbox.id);
        let id = sandbox.id.clone();
        drop(sandbox);
        let instance = self.instance.clone();
        self.space
            .run(move || bridge::settle(&instance, &id).unwrap());
    }

    fn inventory(&self) -> Inventory {
        let (instance, nft) = (self.instance.clone(), Arc::clone(&self.nft));
        self.space
            .run(move || bridge::inventory(&instance, &nft).unwrap())
    }

    /// A namespace that the host reaches directly: 192.0.2.2 and 2001:db8::2, the host being 1.
    fn world(&self) -> Space {
        let world = Space::new();
        let netns = world.path.clone();
        self.space.run(move || {
            let file = File::open(&netns).unwrap();
            connect_world(&file);
        });
        world.serve(80);
        world
    }
}

struct Sandbox {
    space: Space,
    id: SandboxId,
    plan: NetworkPlan,
    attachment: Attachment,
}

impl Sandbox {
    fn v4(&self) -> String {
        self.plan.addresses[0].addr().to_string()
    }

    fn v6(&self) -> String {
        format!("[{}]", self.plan.addresses[1].addr())
    }
}

fn connect_world(world: &File) {
    let mut here = Netlink::open().unwrap();
    here.apply(netlink::test_veth("world", world.as_fd()))
        .unwrap();
    let address = |netlink: &mut Netlink, name: &str, last: u8| {
        let link = netlink.link(name).unwrap().unwrap();
        let v4: IpNet = format!("192.0.2.{last}/24").parse().unwrap();
        let v6: IpNet = format!("2001:db8::{last}/64").parse().unwrap();
        let mut changes = vec![netlink::add_address(link.index, v4)];
        if std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").unwrap() == "0\n" {
            changes.push(netlink::add_address(link.index, v6));
        }
        changes.push(netlink::set_up(name));
        netlink.apply(changes).unwrap();
    };
    address(&mut here, "world", 1);
    in_netns(
        world.as_fd(),
        || Ok(()),
        |()| {
            address(&mut Netlink::open()?, "eth0", 2);
            Ok(())
        },
    )
    .unwrap();
}

fn publish(host_ip: Option<&str>, host_port: u16) -> PortMapping {
    PortMapping {
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        container_port: 80,
        protocol: Protocol::Tcp,
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.trim_matches(['[', ']']).to_owned())
}

#[test]
fn sandboxes_reach_each_other_the_host_and_themselves_in_both_families() {
    let host = Host::new();
    host.rebuild(&[]);
    let (one, two) = (host.sandbox(1, &[]), host.sandbox(2, &[]));
    for sandbox in [&one, &two] {
        sandbox.space.serve(80);
    }
    host.space.serve(80);
    let pairs = [(one.v4(), two.v4()), (one.v6(), two.v6())];
    for (number, (one_ip, two_ip)) in pairs.into_iter().enumerate() {
        assert_eq!(one.space.ask(&format!("{two_ip}:80")), some(&one_ip));
        assert_eq!(two.space.ask(&format!("{one_ip}:80")), some(&two_ip));
        let gateway = one.plan.gateways[number];
        assert_eq!(
            host.space.ask(&format!("{one_ip}:80")),
            Some(gateway.to_string())
        );
        let gateway = SocketAddr::from((gateway, 80)).to_string();
        assert_eq!(two.space.ask(&gateway), some(&two_ip));
    }
    assert_eq!(one.attachment.interface, "eth0");
    assert_eq!(one.attachment.addresses, one.plan.addresses);
}

#[test]
fn the_world_is_reached_behind_the_hosts_address() {
    let host = Host::new();
    host.rebuild(&[]);
    let world = host.world();
    let one = host.sandbox(1, &[]);
    assert_eq!(one.space.ask("192.0.2.2:80"), some("192.0.2.1"));
    assert_eq!(one.space.ask("[2001:db8::2]:80"), some("2001:db8::1"));
    // The world has no route to the sandbox; nothing but masquerading can have answered.
    assert_eq!(world.ask(&format!("{}:80", one.v4())), None);
}

#[test]
fn host_ports_work_from_everywhere() {
    let host = Host::new();
    host.rebuild(&[]);
    let world = host.world();
    let one = host.sandbox(1, &[publish(None, 8080)]);
    let two = host.sandbox(2, &[]);
    one.space.serve(80);
    // From the world, which is seen as what it is.
    assert_eq!(world.ask("192.0.2.1:8080"), some("192.0.2.2"));
    assert_eq!(world.ask("[2001:db8::1]:8080"), some("2001:db8::2"));
    // From the host, by each of its addresses.
    assert_eq!(host.space.ask("192.0.2.1:8080"), some("192.0.2.1"));
    assert_eq!(host.space.ask("[2001:db8::1]:8080"), some("2001:db8::1"));
    assert!(host.space.ask("127.0.0.1:8080").is_some());
    assert_eq!(host.space.ask("[::1]:8080"), None);
    // From a neighbour, and from itself (hairpin).
    for from in [&two, &one] {
        assert!(from.space.ask("192.0.2.1:8080").is_some());
        assert!(from.space.ask("[2001:db8::1]:8080").is_some());
    }
    // Other ports of the host are not touched.
    assert_eq!(world.ask("192.0.2.1:8081"), None);
}

#[test]
fn a_port_on_one_address_is_only_there() {
    let host = Host::new();
    host.rebuild(&[]);
    let world = host.world();
    let ports = [
        publish(Some("127.0.0.1"), 8080),
        publish(Some("192.0.2.1"), 9090),
        publish(Some("2001:db8::1"), 9091),
        publish(Some("0.0.0.0"), 7070),
    ];
    let one = host.sandbox(1, &ports);
    one.space.serve(80);
    assert!(host.space.ask("127.0.0.1:8080").is_some());
    assert_eq!(world.ask("192.0.2.1:8080"), None);
    assert_eq!(world.ask("192.0.2.1:9090"), some("192.0.2.2"));
    assert_eq!(host.space.ask("127.0.0.1:9090"), None);
    assert_eq!(world.ask("[2001:db8::1]:9091"), some("2001:db8::2"));
    assert_eq!(world.ask("192.0.2.1:9091"), None);
    assert_eq!(world.ask("192.0.2.1:7070"), some("192.0.2.2"));
    assert_eq!(world.ask("[2001:db8::1]:7070"), None);
}

/// CVE-2020-8558: with route_localnet, a neighbour could reach what listens on 127.0.0.1.
#[test]
fn the_hosts_loopback_is_closed_to_sandboxes() {
    let host = Host::new();
    host.rebuild(&[]);
    let one = host.sandbox(1, &[]);
    host.space.serve(80);
    one.space.sysctl("ipv4/conf/all/route_localnet", "1");
    let gateway = one.plan.gateways[0];
    one.space.run(move || {
        // 127.9.9.9 by way of the gateway instead of our own loopback.
        let output = Command::new("ip")
            .args([
                "route",
                "replace",
                "local",
                "127.0.0.1/32",
                "dev",
                "lo",
                "table",
                "local",
            ])
            .output();
        output.unwrap();
        for args in [
            vec![
                "route",
                "del",
                "local",
                "127.0.0.0/8",
                "dev",
                "lo",
                "table",
                "local",
            ],
            vec!["route", "add", "127.9.9.9/32", "via", &gateway.to_string()],
        ] {
            let output = Command::new("ip").args(&args).output().unwrap();
            assert!(output.status.success(), "{args:?} {output:?}");
        }
    });
    assert_eq!(one.space.ask("127.9.9.9:80"), None);
    // It is the guard that closes it: without the table the packet arrives.
    let instance = host.instance.clone();
    host.space
        .run(move || Nft::new(&instance).remove().unwrap());
    assert!(one.space.ask("127.9.9.9:80").is_some());
}

#[test]
fn detach_and_the_namespaces_end_leave_nothing() {
    let host = Host::new();
    host.rebuild(&[]);
    let before = host.space.state();
    let one = host.sandbox(1, &[publish(None, 8080), publish(Some("127.0.0.1"), 9090)]);
    let found = host.inventory();
    assert_eq!(
        found.links,
        [(one.id.clone(), one.attachment.host_interface.clone())]
    );
    assert_eq!(found.ports.len(), 3);
    assert_eq!(found.bridges, std::slice::from_ref(&host.network.bridge));
    assert_ne!(host.space.state(), before);
    let id = one.id.clone();
    host.end(one);
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
    // Repeatable by id alone.
    host.detach(&id);
}

#[test]
fn remove_all_leaves_a_host_as_it_was() {
    let host = Host::new();
    let before = host.space.state();
    host.rebuild(&[]);
    let instance = host.instance.clone();
    host.space
        .run(move || bridge::remove(&instance, &Nft::new(&instance)).unwrap());
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
}

#[test]
fn start_and_attach_may_be_repeated() {
    let host = Host::new();
    host.rebuild(&[]);
    let one = host.sandbox(1, &[publish(None, 8080)]);
    one.space.serve(80);
    let before = host.space.state();
    let again = host.try_attach(&one.id, &one.plan, &one.space).unwrap();
    assert_eq!(again, one.attachment);
    host.rebuild(&[(one.id.clone(), one.plan.clone())]);
    host.rebuild(&[(one.id.clone(), one.plan.clone())]);
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
    assert!(host.space.ask("127.0.0.1:8080").is_some());
}

#[test]
fn start_repairs_what_was_flushed_and_removes_what_is_nobodys() {
    let host = Host::new();
    host.rebuild(&[]);
    let one = host.sandbox(1, &[publish(None, 8080)]);
    let stale = host.sandbox(2, &[publish(None, 9090)]);
    one.space.serve(80);
    let bridge = host.network.bridge.clone();
    host.space.run(move || {
        let output = Command::new("nft").args(["flush", "ruleset"]).output();
        assert!(output.unwrap().status.success());
        let mut netlink = Netlink::open().unwrap();
        let link = netlink.link(&bridge).unwrap().unwrap();
        netlink
            .apply(vec![netlink::delete_link(link.index, &bridge)])
            .unwrap();
    });
    assert_eq!(host.space.ask("127.0.0.1:8080"), None);
    host.rebuild(&[(one.id.clone(), one.plan.clone())]);
    assert!(host.space.ask("127.0.0.1:8080").is_some());
    assert!(host.space.ask(&format!("{}:80", one.v6())).is_some());
    let found = host.inventory();
    assert_eq!(found.links.len(), 1, "{found:?}");
    assert!(found.ports.iter().all(|port| port.sandbox == one.id));
    drop(stale);
}

/// A reload of nftables.service flushes all tables.
#[test]
fn a_flushed_table_comes_back_with_the_next_port() {
    let host = Host::new();
    host.rebuild(&[]);
    let one = host.sandbox(1, &[publish(None, 8080)]);
    one.space.serve(80);
    host.space.run(|| {
        let output = Command::new("nft").args(["flush", "ruleset"]).output();
        assert!(output.unwrap().status.success());
    });
    assert_eq!(host.space.ask("127.0.0.1:8080"), None);
    let _two = host.sandbox(2, &[publish(None, 9090)]);
    assert!(host.space.ask("127.0.0.1:8080").is_some());
    assert_eq!(host.inventory().ports.len(), 4);
}

#[test]
fn a_failed_earlier_attempt_is_no_obstacle() {
    let host = Host::new();
    host.rebuild(&[]);
    let first = host.sandbox(1, &[]);
    // A new namespace for the same sandbox, while the old one still lives.
    let space = Space::new();
    host.try_attach(&first.id, &first.plan, &space).unwrap();
    space.serve(80);
    assert!(host.space.ask(&format!("{}:80", first.v4())).is_some());
}

#[test]
fn many_attach_and_detach_at_once() {
    let host = Host::new();
    host.rebuild(&[]);
    let before = host.space.state();
    let all: Vec<_> = (0..16)
        .map(|number| {
            let port = 8000 + u16::try_from(number).unwrap();
            let (id, plan) = host.plan(number, &[publish(None, port)]);
            (Space::new(), id, plan)
        })
        .collect();
    let each: Vec<_> = all
        .iter()
        .map(|(space, id, plan)| (space.path.clone(), id.clone(), plan.clone()))
        .collect();
    let (instance, nft) = (host.instance.clone(), Arc::clone(&host.nft));
    let found = host.space.run(move || {
        let on_each = |work: &(dyn Fn(&PathBuf, &SandboxId, &NetworkPlan) + Sync)| {
            thread::scope(|scope| {
                for (path, id, plan) in &each {
                    scope.spawn(move || work(path, id, plan));
                }
            });
        };
        on_each(&|path, id, plan| {
            bridge::attach(&instance, &nft, id, plan, path).unwrap();
        });
        let found = bridge::inventory(&instance, &nft).unwrap();
        on_each(&|_, id, _| bridge::detach(&nft, id).unwrap());
        found
    });
    assert_eq!((found.links.len(), found.ports.len()), (16, 32));
    drop(all);
    let start = Instant::now();
    while !difference(&host.space.state(), &before).is_empty() && start.elapsed() < WAIT {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
}

#[test]
fn two_instances_live_side_by_side() {
    let host = Host::new();
    host.rebuild(&[]);
    let one = host.sandbox(1, &[publish(None, 8080)]);
    one.space.serve(80);
    let before = host.space.state();
    let instance = InstanceId::random();
    let facts = host.facts;
    let space = Space::new();
    let netns = space.path.clone();
    let (id, taken) = host.plan(2, &[publish(Some("127.0.0.1"), 8080)]);
    let holder = one.id.to_string();
    let second = host.space.run(move || {
        let config = NetworkChapterConfig::default();
        let read = host::Host::read(&mut Netlink::open().unwrap(), &config).unwrap();
        let own = bridge::name(&instance, &config, None);
        let free = |net| read.overlap(IpNet::V4(net), &own).is_none();
        let network = config.choose(&instance, None, free).unwrap();
        let nft = Nft::new(&instance);
        bridge::rebuild(&instance, &nft, std::slice::from_ref(&network), facts, &[]).unwrap();
        let refused = bridge::attach(&instance, &nft, &id, &taken, &netns);
        assert!(
            matches!(&refused, Err(NetworkError::PortTaken { port: 8080, holder: found, .. })
                if found.contains(&holder)),
            "{refused:?}"
        );
        let found = bridge::inventory(&instance, &nft).unwrap();
        assert_eq!((found.links, found.ports), (vec![], vec![]));
        bridge::remove(&instance, &nft).unwrap();
        network
    });
    assert_ne!(second.ipv4, host.network.ipv4);
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
    assert!(host.space.ask("127.0.0.1:8080").is_some());
}

#[test]
fn a_host_without_ipv6_gives_ipv4() {
    let host = Host::with(false);
    host.rebuild(&[]);
    let world = host.world();
    let one = host.sandbox(1, &[publish(None, 8080)]);
    one.space.serve(80);
    assert_eq!(one.plan.addresses.len(), 1);
    assert_eq!(one.space.ask("192.0.2.2:80"), some("192.0.2.1"));
    assert_eq!(world.ask("192.0.2.1:8080"), some("192.0.2.2"));
    host.end(one);
    assert_eq!(host.inventory().links, []);
}

/// An address may be given out while the link of its earlier holder is still dying.
#[test]
fn an_address_follows_its_new_holder_at_once() {
    for ipv6 in [true, false] {
        let host = Host::with(ipv6);
        host.rebuild(&[]);
        let old = host.sandbox(1, &[]);
        old.space.serve(80);
        let address = format!("{}:80", old.v4());
        assert!(host.space.ask(&address).is_some());
        let new = host.sandbox(1, &[]);
        assert_eq!(new.plan.addresses, old.plan.addresses);
        new.space.serve(81);
        let address = format!("{}:81", old.v4());
        assert!(host.space.ask(&address).is_some());
    }
}

/// A host that forwards would otherwise lose the default route that it learned.
#[test]
fn uplinks_go_on_accepting_router_advertisements() {
    let host = Host::new();
    let _world = host.world();
    host.space.sysctl("ipv6/conf/all/forwarding", "0");
    host.space.sysctl("ipv6/conf/world/accept_ra", "1");
    let accepts = host.space.run(|| {
        let output = Command::new("ip")
            .args("-6 route add default via 2001:db8::2 dev world proto ra".split(' '))
            .output();
        assert!(output.unwrap().status.success());
        let config = NetworkChapterConfig::default();
        let host = host::Host::read(&mut Netlink::open().unwrap(), &config).unwrap();
        host::prepare(&host).unwrap();
        ["world", "lo"].map(|link| {
            std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{link}/accept_ra")).unwrap()
        })
    });
    assert_eq!(accepts, ["2\n", "1\n"]);
}

#[test]
fn without_a_network_there_is_only_loopback() {
    let host = Host::new();
    host.rebuild(&[]);
    let before = host.space.state();
    let space = Space::new();
    let (id, pod) = host.plan(1, &[]);
    for mode in [Mode::None, Mode::Host] {
        let plan = NetworkPlan {
            mode,
            ..pod.clone()
        };
        let attachment = host.try_attach(&id, &plan, &space).unwrap();
        assert_eq!(attachment.addresses, []);
    }
    let links = space.run(|| Netlink::open().unwrap().links().unwrap());
    assert_eq!(links.len(), 1);
    assert!(links[0].up);
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
}

#[test]
fn a_port_that_a_process_listens_on_is_refused_before_any_side_effect() {
    let host = Host::new();
    host.rebuild(&[]);
    host.space.serve(8080);
    let before = host.space.state();
    let space = Space::new();
    for ip in [None, Some("0.0.0.0"), Some("127.0.0.1"), Some("::")] {
        let (id, plan) = host.plan(1, &[publish(ip, 8080)]);
        let refused = host.try_attach(&id, &plan, &space);
        assert!(
            matches!(&refused, Err(NetworkError::PortTaken { port: 8080, holder, .. })
                if holder == "a process of the host"),
            "{ip:?} {refused:?}"
        );
    }
    assert_eq!(difference(&host.space.state(), &before), [""; 0]);
}

#[test]
fn a_link_of_somebody_else_is_not_touched() {
    let host = Host::new();
    let name = host.network.bridge.clone();
    host.space.run(move || {
        let output = Command::new("ip")
            .args(["link", "add", &name, "type", "bridge"])
            .output();
        assert!(output.unwrap().status.success());
    });
    let (instance, network, facts) = (host.instance.clone(), host.network.clone(), host.facts);
    let refused = host
        .space
        .run(move || bridge::rebuild(&instance, &Nft::new(&instance), &[network], facts, &[]));
    assert!(
        matches!(refused, Err(NetworkError::ForeignLink { .. })),
        "{refused:?}"
    );
}

/// Datagrams keep their translation as long as they flow, so it has to be ended.
#[test]
fn flows_of_udp_ports_follow_their_publication() {
    let host = Host::new();
    host.rebuild(&[]);
    let world = host.world();
    let port = PortMapping {
        protocol: Protocol::Udp,
        ..publish(None, 5353)
    };
    let client = world.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("192.0.2.1:5353").unwrap();
        // Before anything is published: makes a flow that is not translated.
        socket.send(b"early").unwrap();
        socket
    });
    let is_reached = |sandbox: &Sandbox| {
        let server = sandbox.space.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:80").unwrap();
            let step = Duration::from_millis(10);
            socket.set_read_timeout(Some(step)).unwrap();
            socket
        });
        let start = Instant::now();
        while start.elapsed() < WAIT {
            // An error is the refusal of an earlier datagram.
            let _ = client.send(b"hello");
            if server.recv_from(&mut [0; 16]).is_ok() {
                return true;
            }
        }
        false
    };
    let one = host.sandbox(1, std::slice::from_ref(&port));
    assert!(is_reached(&one), "an early flow was not ended");
    host.end(one);
    let two = host.sandbox(2, &[port]);
    assert!(
        is_reached(&two),
        "the flow of an earlier holder was not ended"
    );
}

#[test]
fn drops_of_other_tables_are_found() {
    let host = Host::new();
    host.rebuild(&[]);
    host.space.run(|| {
        let rules = "add table ip filter; \
                     add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; \
                     add chain ip filter INPUT { type filter hook input priority 0; policy drop; }";
        let output = Command::new("nft").arg(rules).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    });
    let instance = host.instance.clone();
    let network = host.network.clone();
    let findings = host.space.run(move || {
        let config = NetworkChapterConfig::default();
        host::check(&instance, &config, Some(&network)).unwrap()
    });
    let names: Vec<_> = findings.iter().map(Finding::name).collect();
    // Some machines have br_netfilter loaded as well.
    assert!(names.contains(&"forward-drop"), "{findings:?}");
    assert!(
        names
            .iter()
            .all(|name| ["forward-drop", "bridge-filter"].contains(name)),
        "{findings:?}"
    );
    assert!(findings[0].explanation().contains("FORWARD"));
}

#[test]
fn many_ports_fit_in_one_start() {
    let host = Host::new();
    host.rebuild(&[]);
    let ports: Vec<_> = (1000..4000).map(|port| publish(None, port)).collect();
    let one = host.plan(1, &ports);
    for count in [1, 256, 257, 3000] {
        let (id, plan) = one.clone();
        let ports = ports[..count].to_vec();
        host.rebuild(&[(id, NetworkPlan { ports, ..plan })]);
        assert_eq!(host.inventory().ports.len(), 2 * count);
    }
    host.detach(&one.0);
    assert_eq!(host.inventory().ports, []);
}

/// Not a test of speed: prints what attaching and detaching cost here.
#[test]
#[ignore = "a measurement"]
fn cost_of_attach_and_detach() {
    let host = Host::new();
    host.rebuild(&[]);
    for with_port in [false, true] {
        let (mut attach, mut detach, mut settle) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..100 {
            let ports = if with_port {
                vec![publish(None, 8080)]
            } else {
                vec![]
            };
            let space = Space::new();
            let (id, plan) = host.plan(number, &ports);
            let start = Instant::now();
            host.try_attach(&id, &plan, &space).unwrap();
            attach.push(start.elapsed());
            let start = Instant::now();
            host.detach(&id);
            detach.push(start.elapsed());
            drop(space);
            let start = Instant::now();
            let instance = host.instance.clone();
            host.space
                .run(move || bridge::settle(&instance, &id).unwrap());
            settle.push(start.elapsed());
        }
        for (name, mut times) in [("attach", attach), ("detach", detach), ("settle", settle)] {
            times.sort_unstable();
            println!(
                "{name} (port: {with_port}): median {:?}, 90 % {:?}",
                times[50], times[90]
            );
        }
    }
}

/// Through the async face, with a store: what the daemon does.
#[test]
fn start_keeps_its_choice_and_plans_from_claims() {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("tests run as root");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let tables = crate::store::Tables::new()
                .with::<Network>()
                .with::<cni::Cached>();
            let store = Store::open(&dir.path().join("store.db"), tables).unwrap();
            let instance = InstanceId::random();
            let config = NetworkChapterConfig {
                mode: Serving::BuiltIn,
                ..NetworkChapterConfig::default()
            };
            let networks = Networks::new(instance.clone(), config.clone(), store.clone());
            let id = SandboxId::random();
            let wish = SandboxNetwork {
                ports: vec![publish(None, 8080)],
                ..SandboxNetwork::default()
            };
            let pod = PodFacts::default();
            let early = networks.plan(&store.snapshot(), &id, &wish, &pod);
            assert!(matches!(early, Err(NetworkError::NotStarted)));
            networks.start(Vec::new()).await.unwrap();
            networks.start(Vec::new()).await.unwrap();
            let plan = networks.plan(&store.snapshot(), &id, &wish, &pod).unwrap();
            let mut changes = Changes::new();
            for key in plan.claims() {
                changes = changes.claim(key, format!("sandbox/{id}"));
            }
            let at = store.commit(changes).await.unwrap();
            let sandbox = Space::new();
            let attachment = networks
                .attach(&id, &plan, &sandbox.path, None)
                .await
                .unwrap();
            assert_eq!(attachment.addresses, plan.addresses);
            assert_eq!(networks.inventory().await.unwrap().ports.len(), 2);
            networks.detach(&id, None).await.unwrap();
            drop(sandbox);
            networks.settle(&id).await.unwrap();
            assert_eq!(networks.inventory().await.unwrap().links, []);

            let refused = networks.plan(&at, &SandboxId::random(), &wish, &pod);
            assert!(
                matches!(&refused, Err(NetworkError::PortTaken { holder, .. })
                    if *holder == format!("sandbox/{id}")),
                "{refused:?}"
            );

            // Another subnet can't be had while addresses of this one are in use.
            let other = NetworkChapterConfig {
                ipv4: Wished::This("172.20.0.0/16".parse().unwrap()),
                ..config
            };
            let changed = Networks::new(instance, other, store.clone());
            let refused = changed.start(Vec::new()).await;
            assert!(
                matches!(refused, Err(NetworkError::Config { .. })),
                "{refused:?}"
            );
            let holder = format!("sandbox/{id}");
            store
                .commit(Changes::new().release_holder(holder))
                .await
                .unwrap();
            changed.start(Vec::new()).await.unwrap();
            let network = changed.get(&store.snapshot(), "default").unwrap();
            assert_eq!(network.ipv4.unwrap().to_string(), "172.20.0.0/16");
            changed.remove_all().await.unwrap();
            assert_eq!(changed.inventory().await.unwrap(), Inventory::default());
        });
    })
    .join()
    .unwrap();
}
