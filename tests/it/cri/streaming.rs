//! Exec, attach and port-forward as their clients see them: a real agent, real sockets, and a client
//! of each protocol.

use std::{collections::HashMap, fs, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::{Compress, Compression, FlushCompress};
use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use longshore_proto::cri::v1 as cri;
use longshore_tests::pods::{Bench, Pod, WAIT_LIMIT, container, pod, read_log, script, wait_for};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}
type AnyIo = Box<dyn Io>;

/// Channels as WebSocket numbers them; a SPDY stream has its place in this order.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Spdy,
    WebSocket,
}

/// What a client wants to happen, and what it is told.
#[derive(Clone, Copy, Debug, Default)]
struct Wish {
    stdin: bool,
    tty: bool,
}

/// Connects to the address of `url` inside the machine; with `ca` over TLS.
async fn dial(bench: &Bench, url: &str, ca: Option<&str>) -> Result<(AnyIo, String, String)> {
    let (scheme, rest) = url.split_once("://").context("a scheme")?;
    let (host, path) = rest.split_once('/').context("a path")?;
    let address: SocketAddr = host.parse()?;
    let socket = bench
        .machine()
        .run(move || std::net::TcpStream::connect(address))?;
    socket.set_nonblocking(true)?;
    let socket = TcpStream::from_std(socket)?;
    let io: AnyIo = match (scheme, ca) {
        ("http", None) => Box::new(socket),
        ("https", Some(ca)) => {
            let mut roots = rustls::RootCertStore::empty();
            use rustls::pki_types::pem::PemObject as _;
            roots.add(rustls::pki_types::CertificateDer::from_pem_slice(
                ca.as_bytes(),
            )?)?;
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
            let name = rustls::pki_types::ServerName::from(address.ip());
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            Box::new(connector.connect(name, socket).await?)
        }
        other => bail!("unexpected scheme of {url}: {other:?}"),
    };
    Ok((io, host.to_owned(), format!("/{path}")))
}

/// Sends an upgrade to SPDY; answers the status line and headers.
async fn upgrade(io: &mut AnyIo, host: &str, path: &str, versions: &str) -> Result<String> {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {versions}\r\n\r\n"
    );
    io.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(WAIT_LIMIT, io.read_u8()).await??);
    }
    Ok(String::from_utf8(head)?)
}

/// What the server sends on a SPDY connection.
#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Reply(u32),
    Data(u32, Vec<u8>),
    End(u32),
    Reset(u32),
    GoAway,
    Closed,
}

/// A SPDY/3.1 client that needs no more of the protocol than Kubernetes' do.
struct Spdy {
    io: AnyIo,
    zlib: Compress,
}

impl Spdy {
    fn new(io: AnyIo) -> Self {
        Self {
            io,
            zlib: Compress::new(Compression::fast(), true),
        }
    }

    async fn open(&mut self, id: u32, headers: &[(&str, &str)]) -> Result<()> {
        let word = |bytes: &mut Vec<u8>, text: &str| -> Result<()> {
            bytes.extend(u32::try_from(text.len())?.to_be_bytes());
            bytes.extend(text.as_bytes());
            Ok(())
        };
        let mut block = u32::try_from(headers.len())?.to_be_bytes().to_vec();
        for (name, value) in headers {
            word(&mut block, name)?;
            word(&mut block, value)?;
        }
        let mut packed = Vec::with_capacity(1024);
        self.zlib
            .compress_vec(&block, &mut packed, FlushCompress::Sync)?;
        let mut frame = vec![0x80, 3, 0, 1, 0];
        frame.extend(&u32::try_from(10 + packed.len())?.to_be_bytes()[1..]);
        frame.extend(id.to_be_bytes());
        frame.extend([0; 6]);
        frame.extend(packed);
        self.io.write_all(&frame).await?;
        Ok(())
    }

    async fn data(&mut self, id: u32, bytes: &[u8], end: bool) -> Result<()> {
        let mut frame = id.to_be_bytes().to_vec();
        frame.push(u8::from(end));
        frame.extend(&u32::try_from(bytes.len())?.to_be_bytes()[1..]);
        frame.extend(bytes);
        self.io.write_all(&frame).await?;
        Ok(())
    }

    async fn frame(&mut self) -> Result<Frame> {
        loop {
            let mut head = [0; 8];
            if let Err(error) = timeout(WAIT_LIMIT, self.io.read_exact(&mut head)).await? {
                return match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => Ok(Frame::Closed),
                    _ => Err(error.into()),
                };
            }
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]);
            let mut body = vec![0; usize::try_from(length)?];
            self.io.read_exact(&mut body).await?;
            let number = |at: usize| -> Result<u32> {
                Ok(u32::from_be_bytes(
                    body.get(at..at + 4).context("a number")?.try_into()?,
                ))
            };
            return Ok(match first {
                0x8003_0002 => Frame::Reply(number(0)?),
                0x8003_0003 => Frame::Reset(number(0)?),
                0x8003_0007 => Frame::GoAway,
                id if id >> 31 == 0 && head[4] == 1 => Frame::End(id),
                id if id >> 31 == 0 => Frame::Data(id, body),
                _ => continue,
            });
        }
    }
}

enum Wire {
    Spdy(Spdy, HashMap<u8, u32>),
    WebSocket(WebSocketStream<AnyIo>),
}

/// A client of exec or attach.
struct Client {
    wire: Wire,
    /// What came on each channel.
    got: HashMap<u8, Vec<u8>>,
    closed: bool,
}

impl Client {
    async fn connect(
        bench: &Bench,
        carrier: Carrier,
        url: &str,
        wish: Wish,
        ca: Option<&str>,
    ) -> Result<Self> {
        let (mut io, host, path) = dial(bench, url, ca).await?;
        let wire = match carrier {
            Carrier::Spdy => {
                let head =
                    upgrade(&mut io, &host, &path, "v5.channel.k8s.io,v4.channel.k8s.io").await?;
                ensure!(
                    head.starts_with("HTTP/1.1 101 ") && head.contains("v4.channel.k8s.io"),
                    "{head}"
                );
                let mut spdy = Spdy::new(io);
                let mut streams = HashMap::new();
                let kinds = [
                    (ERROR, "error", true),
                    (STDIN, "stdin", wish.stdin),
                    (STDOUT, "stdout", true),
                    (STDERR, "stderr", !wish.tty),
                    (RESIZE, "resize", wish.tty),
                ];
                for (channel, kind, _) in kinds.into_iter().filter(|(_, _, wanted)| *wanted) {
                    let id = 2 * u32::try_from(streams.len())? + 1;
                    spdy.open(id, &[("streamtype", kind)]).await?;
                    let answer = spdy.frame().await?;
                    ensure!(answer == Frame::Reply(id), "{kind}: {answer:?}");
                    streams.insert(channel, id);
                }
                Wire::Spdy(spdy, streams)
            }
            Carrier::WebSocket => {
                let mut request = url.replacen("http", "ws", 1).into_client_request()?;
                request
                    .headers_mut()
                    .insert("sec-websocket-protocol", "v5.channel.k8s.io".parse()?);
                let (socket, answer) = client_async(request, io).await?;
                ensure!(
                    answer.headers()["sec-websocket-protocol"] == "v5.channel.k8s.io",
                    "{answer:?}"
                );
                Wire::WebSocket(socket)
            }
        };
        Ok(Self {
            wire,
            got: HashMap::new(),
            closed: false,
        })
    }

    async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        match &mut self.wire {
            Wire::Spdy(spdy, streams) => spdy.data(streams[&channel], bytes, false).await,
            Wire::WebSocket(socket) => {
                let message = [&[channel], bytes].concat();
                Ok(socket.send(Message::Binary(message.into())).await?)
            }
        }
    }

    async fn half_close(&mut self) -> Result<()> {
        match &mut self.wire {
            Wire::Spdy(spdy, streams) => spdy.data(streams[&STDIN], &[], true).await,
            Wire::WebSocket(socket) => {
                let message = vec![255, STDIN];
                Ok(socket.send(Message::Binary(message.into())).await?)
            }
        }
    }

    /// Takes what comes next, or learns that all has been said.
    async fn step(&mut self) -> Result<()> {
        match &mut self.wire {
            Wire::Spdy(spdy, streams) => match spdy.frame().await? {
                Frame::Data(id, bytes) => {
                    let (channel, _) = streams
                        .iter()
                        .find(|(_, stream)| **stream == id)
                        .context("a stream of ours")?;
                    self.got.entry(*channel).or_default().extend(bytes);
                }
                Frame::GoAway | Frame::Closed => self.closed = true,
                _ => {}
            },
            Wire::WebSocket(socket) => match timeout(WAIT_LIMIT, socket.next()).await? {
                Some(Ok(Message::Binary(bytes))) => {
                    let (channel, bytes) = bytes.split_first().context("a channel")?;
                    if *channel != 255 {
                        self.got.entry(*channel).or_default().extend(bytes);
                    }
                }
                Some(Ok(Message::Close(_))) | None => self.closed = true,
                Some(other) => drop(other?),
            },
        }
        Ok(())
    }

    fn text(&self, channel: u8) -> String {
        let bytes = self.got.get(&channel).map(Vec::as_slice);
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    async fn wait_for(&mut self, channel: u8, part: &str) -> Result<()> {
        while !self.text(channel).contains(part) {
            ensure!(!self.closed, "closed before {part:?}: {:?}", self.got);
            self.step().await?;
        }
        Ok(())
    }

    /// Reads to the end; answers the status on the error stream.
    async fn status(&mut self) -> Result<serde_json::Value> {
        while !self.closed {
            self.step().await?;
        }
        let text = self.text(ERROR);
        serde_json::from_str(&text).with_context(|| format!("{text:?} of {:?}", self.got))
    }
}

async fn exec_url(bench: &Bench, id: &str, wish: Wish, command: &[&str]) -> Result<String> {
    let request = cri::ExecRequest {
        container_id: id.to_owned(),
        cmd: command.iter().map(|word| (*word).to_owned()).collect(),
        tty: wish.tty,
        stdin: wish.stdin,
        stdout: true,
        stderr: !wish.tty,
    };
    Ok(bench.runtime.clone().exec(request).await?.into_inner().url)
}

async fn exec(
    bench: &Bench,
    carrier: Carrier,
    id: &str,
    wish: Wish,
    command: &[&str],
) -> Result<Client> {
    let url = exec_url(bench, id, wish, command).await?;
    Client::connect(bench, carrier, &url, wish, None).await
}

async fn sleeper(bench: &mut Bench, name: &str) -> Result<(Pod, String)> {
    let pod = bench.run(pod(name)).await?;
    let config = container("main", &bench.toolbox.clone(), &["sleep", "10000"]);
    let id = bench.launch(&pod, config).await?;
    Ok((pod, id))
}

fn exit_code(status: &serde_json::Value) -> Option<&str> {
    let cause = &status["details"]["causes"][0];
    (status["reason"] == "NonZeroExitCode" && cause["reason"] == "ExitCode")
        .then(|| cause["message"].as_str())
        .flatten()
}

const PIPED: Wish = Wish {
    stdin: true,
    tty: false,
};
const TERMINAL: Wish = Wish {
    stdin: true,
    tty: true,
};

/// CRI contract 9.2, 9.3, 9.4, 9.5 and 9.7: a command from its upgrade to its exit code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_carried_by_either_protocol() -> Result<()> {
    let mut bench = Bench::start().await?;
    let (_pod, id) = sleeper(&mut bench, "streams").await?;
    for carrier in [Carrier::Spdy, Carrier::WebSocket] {
        // The end of the input reaches the command, what it says comes back in two streams.
        let command = ["sh", "-c", "cat; echo err >&2; exit 7"];
        let mut client = exec(&bench, carrier, &id, PIPED, &command).await?;
        client.send(STDIN, b"half").await?;
        client.send(STDIN, b"-closed").await?;
        client.wait_for(STDOUT, "half-closed").await?;
        client.half_close().await?;
        let status = client.status().await?;
        assert_eq!(exit_code(&status), Some("7"), "{carrier:?}: {status}");
        assert_eq!(client.text(STDOUT), "half-closed", "{carrier:?}");
        assert_eq!(client.text(STDERR), "err\n", "{carrier:?}");
        // Megabytes there and back.
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at % 251) as u8).collect();
        let mut client = exec(&bench, carrier, &id, PIPED, &["wc", "-c"]).await?;
        for piece in bytes.chunks(60 << 10) {
            client.send(STDIN, piece).await?;
        }
        client.half_close().await?;
        assert_eq!(client.status().await?["status"], "Success", "{carrier:?}");
        assert_eq!(client.text(STDOUT).trim(), "3145728", "{carrier:?}");
        let all = ["head", "-c", "5000000", "/dev/zero"];
        let mut client = exec(&bench, carrier, &id, Wish::default(), &all).await?;
        assert_eq!(client.status().await?["status"], "Success", "{carrier:?}");
        assert_eq!(client.got[&STDOUT].len(), 5_000_000, "{carrier:?}");
        // A terminal has the client's size, also the new one.
        let mut client = exec(&bench, carrier, &id, TERMINAL, &["sh"]).await?;
        client.send(RESIZE, br#"{"Width":101,"Height":37}"#).await?;
        client
            .send(
                STDIN,
                b"until stty size | grep -q '37 101'; do :; done; echo fir\"\"st\n",
            )
            .await?;
        client.wait_for(STDOUT, "first").await?;
        client
            .send(
                RESIZE,
                br#"{"Width":133,"Height":41}{"Width":0,"Height":0}"#,
            )
            .await?;
        client
            .send(
                STDIN,
                b"until stty size | grep -q '41 133'; do :; done; echo sec\"\"ond\nexit 5\n",
            )
            .await?;
        client.wait_for(STDOUT, "second").await?;
        let status = client.status().await?;
        assert_eq!(exit_code(&status), Some("5"), "{carrier:?}: {status}");
        // What can't be run is told where the exit code is told.
        let mut client = exec(&bench, carrier, &id, Wish::default(), &["/no/such"]).await?;
        let status = client.status().await?;
        assert_eq!(
            (status["reason"].as_str(), status["code"].as_u64()),
            (Some("InternalError"), Some(500)),
            "{carrier:?}: {status}"
        );
        // A URL is good once, whatever came of it.
        let url = exec_url(&bench, &id, Wish::default(), &["true"]).await?;
        let mut client = Client::connect(&bench, carrier, &url, Wish::default(), None).await?;
        assert_eq!(client.status().await?["status"], "Success", "{carrier:?}");
        let (mut io, host, path) = dial(&bench, &url, None).await?;
        let head = upgrade(&mut io, &host, &path, "v4.channel.k8s.io").await?;
        assert!(head.starts_with("HTTP/1.1 404 "), "{carrier:?}: {head}");
    }
    // A version that nobody speaks is answered with those that are spoken.
    let url = exec_url(&bench, &id, Wish::default(), &["true"]).await?;
    let (mut io, host, path) = dial(&bench, &url, None).await?;
    let head = upgrade(&mut io, &host, &path, "v9.channel.k8s.io").await?;
    assert!(
        head.starts_with("HTTP/1.1 403 ")
            && head
                .to_ascii_lowercase()
                .contains("x-accepted-stream-protocol-versions: v4.channel.k8s.io"),
        "{head}"
    );
    bench.finish().await
}

/// CRI contract 8.3: attached clients come and go; the first end of input is the container's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_attach_by_either_protocol() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("attached")).await?;
    for carrier in [Carrier::Spdy, Carrier::WebSocket] {
        let mut config = container("shell", &toolbox, &["sh"]);
        config.stdin = true;
        config.stdin_once = true;
        let id = bench.launch(&pod, config).await?;
        let request = cri::AttachRequest {
            container_id: id.clone(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let url = bench
            .runtime
            .attach(request.clone())
            .await?
            .into_inner()
            .url;
        let mut client = Client::connect(&bench, carrier, &url, PIPED, None).await?;
        // One that only looks, and leaves in the middle.
        let looks = cri::AttachRequest {
            stdin: false,
            ..request
        };
        let url = bench.runtime.attach(looks).await?.into_inner().url;
        let mut other = Client::connect(&bench, carrier, &url, Wish::default(), None).await?;
        client.send(STDIN, b"echo one; echo bad >&2\n").await?;
        client.wait_for(STDOUT, "one\n").await?;
        client.wait_for(STDERR, "bad\n").await?;
        // It sees what is written after it was attached, and nobody says when that is.
        {
            let sees = other.wait_for(STDOUT, "again\n");
            tokio::pin!(sees);
            loop {
                client.send(STDIN, b"echo again\n").await?;
                if let Ok(seen) = timeout(Duration::from_millis(100), &mut sees).await {
                    seen?;
                    break;
                }
            }
        }
        drop(other);
        client.send(STDIN, b"echo two; exit 9\n").await?;
        client.half_close().await?;
        assert_eq!(client.status().await?["status"], "Success", "{carrier:?}");
        assert!(client.text(STDOUT).ends_with("two\n"), "{carrier:?}");
        assert_eq!(bench.wait_exited(&id).await?.exit_code, 9);
        bench.remove_container(&id).await?;
    }
    bench.finish().await
}

/// CRI contract 9.5 and 9.7: hundreds of commands at once, and clients that do not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_holds_up_only_itself() -> Result<()> {
    const CLIENTS: usize = 200;
    let mut bench = Bench::start().await?;
    let (pod, id) = sleeper(&mut bench, "crowd").await?;
    // A container that writes without end is attached to by one who does not read.
    let toolbox = bench.toolbox.clone();
    let text = "i=0; while :; do i=$((i+1)); echo \"$i a line that makes the pipes full before long\"; done";
    let writer = bench.launch(&pod, script("writer", &toolbox, text)).await?;
    let request = cri::AttachRequest {
        container_id: writer.clone(),
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let mut deaf = Vec::new();
    for carrier in [Carrier::Spdy, Carrier::WebSocket] {
        let url = bench
            .runtime
            .attach(request.clone())
            .await?
            .into_inner()
            .url;
        deaf.push(Client::connect(&bench, carrier, &url, Wish::default(), None).await?);
        let endless = ["cat", "/dev/zero"];
        deaf.push(exec(&bench, carrier, &id, Wish::default(), &endless).await?);
    }
    let carrier = |at: usize| [Carrier::Spdy, Carrier::WebSocket][at % 2];
    let opened = (0..CLIENTS).map(async |at| {
        let mut client = exec(&bench, carrier(at), &id, PIPED, &["cat"]).await?;
        client
            .send(STDIN, format!("client {at}\n").as_bytes())
            .await?;
        client.wait_for(STDOUT, &format!("client {at}\n")).await?;
        anyhow::Ok(client)
    });
    // All are there at once before the first goes.
    let clients: Vec<Client> = join_all(opened).await.into_iter().collect::<Result<_>>()?;
    let ended = clients
        .into_iter()
        .enumerate()
        .map(async |(at, mut client)| {
            client.half_close().await?;
            let status = client.status().await?;
            ensure!(status["status"] == "Success", "client {at}: {status}");
            ensure!(client.text(STDOUT) == format!("client {at}\n"));
            anyhow::Ok(())
        });
    join_all(ended).await.into_iter().collect::<Result<()>>()?;
    // The container's own output has gone on all the while, past any pipe.
    let log = bench.status(&writer).await?.log_path;
    wait_for("the log to go on", async || {
        Ok(fs::metadata(&log)?.len() > 4 << 20)
    })
    .await?;
    drop(deaf);
    bench.stop_container(&writer, 0).await?;
    let lines = read_log(std::path::Path::new(&log))?.stdout();
    let numbers = lines.lines().filter_map(|line| line.split(' ').next());
    for (at, number) in numbers.enumerate().take(10_000) {
        assert_eq!(number, (at + 1).to_string(), "a line is missing");
    }
    bench.finish().await
}

/// CRI contract 9.6 and 9.7: ports of a pod over SPDY, plain and inside a WebSocket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_are_forwarded_by_either_protocol() -> Result<()> {
    const PAIRS: u32 = 60;
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let pod = bench.run(pod("ports")).await?;
    let id = bench
        .launch(&pod, container("web", &toolbox, &["/bin/page-server"]))
        .await?;
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![8080],
    };
    for carrier in [Carrier::Spdy, Carrier::WebSocket] {
        let answered = wait_for("the page server", async || {
            let url = bench
                .runtime
                .clone()
                .port_forward(request.clone())
                .await?
                .into_inner()
                .url;
            let mut spdy = forwarding(&bench, carrier, &url).await?;
            let page = fetch(&mut spdy, 1, 8080).await?;
            Ok(page.starts_with("HTTP/1.1 200"))
        });
        answered.await?;
        let url = bench
            .runtime
            .port_forward(request.clone())
            .await?
            .into_inner()
            .url;
        let mut spdy = forwarding(&bench, carrier, &url).await?;
        // Many at once on one connection.
        for pair in 0..PAIRS {
            open_pair(&mut spdy, 4 * pair + 1, 8080).await?;
            let data = 4 * pair + 3;
            spdy.data(data, b"GET / HTTP/1.0\r\n\r\n", false).await?;
        }
        let mut pages: HashMap<u32, Vec<u8>> = HashMap::new();
        let mut ended = 0;
        while ended < PAIRS {
            match spdy.frame().await? {
                Frame::Data(stream, bytes) => pages.entry(stream).or_default().extend(bytes),
                Frame::End(stream) if stream % 4 == 3 => ended += 1,
                Frame::Reply(_) | Frame::End(_) => {}
                other => bail!("{carrier:?}: {other:?}"),
            }
        }
        for pair in 0..PAIRS {
            let page = String::from_utf8_lossy(&pages[&(4 * pair + 3)]).into_owned();
            assert!(page.starts_with("HTTP/1."), "{carrier:?} {pair}: {page}");
            assert!(!pages.contains_key(&(4 * pair + 1)), "{carrier:?} {pair}");
        }
        // A port that nobody serves is told; the connection goes on.
        let first = 4 * PAIRS + 1;
        open_pair(&mut spdy, first, 9).await?;
        let mut told = String::new();
        loop {
            match spdy.frame().await? {
                Frame::Data(stream, bytes) if stream == first => {
                    told.push_str(&String::from_utf8_lossy(&bytes));
                }
                Frame::End(stream) if stream == first => break,
                Frame::Reply(_) | Frame::End(_) => {}
                other => bail!("{carrier:?}: {other:?}"),
            }
        }
        assert!(told.contains('9') && told.contains("refused"), "{told}");
        let page = fetch(&mut spdy, first + 4, 8080).await?;
        assert!(page.starts_with("HTTP/1."), "{carrier:?}: {page}");
    }
    bench.remove_container(&id).await?;
    bench.finish().await
}

async fn forwarding(bench: &Bench, carrier: Carrier, url: &str) -> Result<Spdy> {
    let (mut io, host, path) = dial(bench, url, None).await?;
    if carrier == Carrier::Spdy {
        let head = upgrade(&mut io, &host, &path, "portforward.k8s.io").await?;
        ensure!(head.starts_with("HTTP/1.1 101 "), "{head}");
        return Ok(Spdy::new(io));
    }
    let mut request = url.replacen("http", "ws", 1).into_client_request()?;
    let tunnel = "SPDY/3.1+portforward.k8s.io";
    request
        .headers_mut()
        .insert("sec-websocket-protocol", tunnel.parse()?);
    let (socket, _) = client_async(request, io).await?;
    let (near, far) = tokio::io::duplex(64 << 10);
    let (mut from, mut to) = tokio::io::split(far);
    let (mut sink, mut stream) = socket.split();
    tokio::spawn(async move {
        let mut buffer = vec![0; 32 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let message = Message::Binary(buffer[..count].to_vec().into());
            if sink.send(message).await.is_err() {
                break;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Binary(bytes) = message
                && to.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
    });
    Ok(Spdy::new(Box::new(near)))
}

/// Opens the two streams of a connection; the client has nothing to say on the error stream.
async fn open_pair(spdy: &mut Spdy, error: u32, port: u16) -> Result<()> {
    let (request, port) = (error.to_string(), port.to_string());
    for (id, kind) in [(error, "error"), (error + 2, "data")] {
        let headers = [
            ("streamtype", kind),
            ("port", &*port),
            ("requestid", &*request),
        ];
        spdy.open(id, &headers).await?;
    }
    spdy.data(error, &[], true).await
}

async fn fetch(spdy: &mut Spdy, error: u32, port: u16) -> Result<String> {
    open_pair(spdy, error, port).await?;
    spdy.data(error + 2, b"GET / HTTP/1.0\r\n\r\n", false)
        .await?;
    let mut page = String::new();
    loop {
        match spdy.frame().await? {
            Frame::Data(_, bytes) => page.push_str(&String::from_utf8_lossy(&bytes)),
            Frame::End(stream) if stream == error + 2 => return Ok(page),
            Frame::Reply(_) | Frame::End(_) => {}
            other => bail!("{other:?} after {page:?}"),
        }
    }
}

/// CRI contract 9.1: with a certificate configured, URLs and what is behind them are TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_served_over_tls_if_configured() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let pair = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])?;
    let ca = pair.cert.pem();
    fs::write(&certificate, &ca)?;
    fs::write(&key, pair.signing_key.serialize_pem())?;
    let config = format!(
        "[streaming.tls]\ncertificate = {:?}\nkey = {:?}\n",
        certificate.display().to_string(),
        key.display().to_string()
    );
    let mut bench = Bench::start_configured(&config).await?;
    let (_pod, id) = sleeper(&mut bench, "secured").await?;
    for carrier in [Carrier::Spdy, Carrier::WebSocket] {
        let url = exec_url(&bench, &id, PIPED, &["cat"]).await?;
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        // In clear nothing is answered, and the token is not used up by it.
        let clear = url.replacen("https", "http", 1);
        let (mut io, host, path) = dial(&bench, &clear, None).await?;
        let refused = upgrade(&mut io, &host, &path, "v4.channel.k8s.io").await;
        assert!(refused.is_err(), "{refused:?}");
        let mut client = Client::connect(&bench, carrier, &url, PIPED, Some(&ca)).await?;
        client.send(STDIN, b"secret").await?;
        client.half_close().await?;
        assert_eq!(client.status().await?["status"], "Success", "{carrier:?}");
        assert_eq!(client.text(STDOUT), "secret", "{carrier:?}");
    }
    // One who says nothing holds up nobody.
    let url = exec_url(&bench, &id, PIPED, &["cat"]).await?;
    let _silent = dial(&bench, &url.replacen("https", "http", 1), None).await?;
    let mut client = Client::connect(&bench, Carrier::Spdy, &url, PIPED, Some(&ca)).await?;
    tokio::time::sleep(Duration::from_millis(1)).await;
    client.half_close().await?;
    assert_eq!(client.status().await?["status"], "Success");
    bench.finish().await
}
