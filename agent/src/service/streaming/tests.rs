//! Clients of either protocol against the server's side: real sockets, real frames.

use std::{future::Future, net::SocketAddr, time::Duration};

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::{
    channel::Activity,
    port_forward::{self, Place},
    remote_command::{self, Client, ErrorStyle, Wanted},
    spdy::{Connection, Encoder, Headers, Inflater},
    websocket::{self, Coding},
};

/// For what must happen, however slow the machine.
const LONG: Duration = Duration::from_secs(60);

/// What a client reads.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    Reply(u32),
    Data(u32, Bytes),
    End(u32),
    Reset(u32, u32),
    Ping(u32),
    GoAway,
    Closed,
}

/// A small client.
struct Spdy<T> {
    io: T,
    encoder: Encoder,
    inflater: Inflater,
    buffer: BytesMut,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Spdy<T> {
    fn new(io: T) -> Self {
        Self {
            io,
            encoder: Encoder::new(),
            inflater: Inflater::new(),
            buffer: BytesMut::new(),
        }
    }

    async fn write(&mut self, frame: impl FnOnce(&mut Encoder, &mut BytesMut)) {
        let mut wire = BytesMut::new();
        frame(&mut self.encoder, &mut wire);
        self.io.write_all(&wire).await.expect("server reads");
    }

    async fn open<const N: usize>(&mut self, id: u32, headers: [(&str, &str); N]) -> Read {
        let headers = Headers::from(headers);
        self.write(|encoder, wire| encoder.open(wire, id, false, &headers))
            .await;
        self.read().await
    }

    async fn send(&mut self, id: u32, bytes: &[u8]) {
        self.write(|encoder, wire| encoder.data(wire, id, false, bytes))
            .await;
    }

    async fn end(&mut self, id: u32) {
        self.write(|encoder, wire| encoder.data(wire, id, true, &[]))
            .await;
    }

    async fn read(&mut self) -> Read {
        loop {
            if let Some(read) = self.take() {
                return read;
            }
            let more = timeout(LONG, self.io.read_buf(&mut self.buffer)).await;
            if more.expect("the server answers").unwrap_or(0) == 0 {
                return Read::Closed;
            }
        }
    }

    /// Independent of the server's decoder.
    fn take(&mut self) -> Option<Read> {
        loop {
            let head = self.buffer.first_chunk::<8>()?;
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            let (first, flags) = (
                u32::from_be_bytes([head[0], head[1], head[2], head[3]]),
                head[4],
            );
            if self.buffer.len() < 8 + length {
                return None;
            }
            self.buffer.advance(8);
            let body = self.buffer.split_to(length).freeze();
            let number =
                |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("four bytes"));
            return Some(match first {
                0x8003_0002 => {
                    let headers = self.inflater.read(&body[4..]).expect("a header block");
                    assert_eq!(headers, Headers::default());
                    Read::Reply(number(0))
                }
                0x8003_0003 => Read::Reset(number(0), number(4)),
                0x8003_0006 => Read::Ping(number(0)),
                0x8003_0007 => Read::GoAway,
                0x8003_0009 => continue,
                id if id >> 31 == 0 && flags == 1 => {
                    assert!(body.is_empty());
                    Read::End(id)
                }
                id if id >> 31 == 0 => Read::Data(id, body),
                other => panic!("unexpected frame {other:x}"),
            });
        }
    }

    /// Everything until the server has closed.
    async fn rest(&mut self) -> Vec<Read> {
        let mut all = Vec::new();
        loop {
            match self.read().await {
                Read::Closed => return all,
                read => all.push(read),
            }
        }
    }
}

fn connection() -> (Spdy<DuplexStream>, Connection) {
    let (near, far) = duplex(64 << 10);
    (Spdy::new(near), Connection::new(far, Activity::new()))
}

const ALL: Wanted = Wanted {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};

/// Serves a command that is played by `run`.
fn command<F>(
    wanted: Wanted,
    run: impl FnOnce(Client) -> F + Send + 'static,
) -> (Spdy<DuplexStream>, JoinHandle<()>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (client, connection) = connection();
    let serving = remote_command::spdy::serve(connection, wanted, ErrorStyle::Status, run);
    (client, tokio::spawn(serving))
}

async fn cat(mut client: Client) {
    let (stdout, mut stdin) = (
        client.stdout.expect("stdout"),
        client.stdin.take().expect("stdin"),
    );
    while let Some(bytes) = stdin.next().await {
        stdout.send(bytes).await.expect("client reads");
    }
    stdout.end().await.expect("client reads");
    client
        .error
        .send("status".into())
        .await
        .expect("client reads");
    client.error.end().await.expect("client reads");
}

#[tokio::test]
async fn a_command_over_spdy_from_first_stream_to_goodbye() {
    let (mut client, serving) = command(ALL, cat);
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        assert_eq!(
            client.open(id, [("streamType", kind)]).await,
            Read::Reply(id)
        );
    }
    client.write(|encoder, wire| encoder.ping(wire, 1)).await;
    assert_eq!(client.read().await, Read::Ping(1));
    client.send(3, b"hello").await;
    assert_eq!(
        client.read().await,
        Read::Data(5, Bytes::from_static(b"hello"))
    );
    client.end(3).await;
    let rest = client.rest().await;
    let status = Read::Data(1, Bytes::from_static(b"status"));
    assert_eq!(rest, [Read::End(5), status, Read::End(1), Read::GoAway]);
    drop(client);
    serving.await.expect("no panic");
}

#[tokio::test]
async fn streams_that_are_not_wanted_are_empty_or_refused() {
    let wanted = Wanted {
        stdout: true,
        ..Wanted::default()
    };
    let (finish, finished) = oneshot::channel();
    let (mut client, serving) = command(wanted, async move |client: Client| {
        assert!(client.stdin.is_none() && client.stderr.is_none());
        finished.await.expect("told");
        client.error.end().await.expect("client reads");
    });
    assert_eq!(
        client.open(1, [("streamtype", "error")]).await,
        Read::Reply(1)
    );
    assert_eq!(
        client.open(3, [("streamtype", "stderr")]).await,
        Read::Reply(3)
    );
    assert_eq!(client.read().await, Read::End(3));
    assert_eq!(
        client.open(5, [("streamtype", "error")]).await,
        Read::Reset(5, 3)
    );
    assert_eq!(
        client.open(7, [("streamtype", "what")]).await,
        Read::Reset(7, 3)
    );
    assert_eq!(
        client.open(8, [("streamtype", "stdout")]).await,
        Read::Reset(8, 1)
    );
    assert_eq!(
        client.open(7, [("streamtype", "stdout")]).await,
        Read::Reset(7, 1)
    );
    assert_eq!(
        client.open(9, [("streamtype", "stdout")]).await,
        Read::Reply(9)
    );
    assert_eq!(
        client.open(11, [("streamtype", "stdin")]).await,
        Read::Reply(11)
    );
    client.send(11, b"nobody reads this").await;
    finish.send(()).expect("waited for");
    assert_eq!(
        client.rest().await,
        [Read::End(11), Read::End(1), Read::GoAway]
    );
    drop(client);
    serving.await.expect("no panic");
}

#[tokio::test]
async fn sizes_of_the_terminal_arrive_also_late() {
    let wanted = Wanted {
        stdout: true,
        tty: true,
        ..Wanted::default()
    };
    let (tell, told) = oneshot::channel();
    let (mut client, _serving) = command(wanted, async move |mut client: Client| {
        let size = client
            .sizes
            .wait_for(Option::is_some)
            .await
            .expect("a size");
        tell.send(*size).expect("waited for");
    });
    for (id, kind) in [(1, "error"), (3, "stdout"), (5, "resize")] {
        assert_eq!(
            client.open(id, [("streamtype", kind)]).await,
            Read::Reply(id)
        );
    }
    client.send(5, br#"{"Width":132,"Hei"#).await;
    client.send(5, br#"ght":43}"#).await;
    assert_eq!(told.await.expect("told"), Some((132, 43)));
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed() {
    let (tell, told) = oneshot::channel();
    let (mut client, serving) = command(ALL, async move |client: Client| {
        client.gone.cancelled().await;
        tell.send(()).expect("waited for");
    });
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        assert_eq!(
            client.open(id, [("streamtype", kind)]).await,
            Read::Reply(id)
        );
    }
    drop(client);
    timeout(LONG, told).await.expect("noticed").expect("told");
    serving.await.expect("no panic");
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_dropped() {
    let (mut client, serving) = command(ALL, cat);
    // A control frame of version 9.
    client
        .io
        .write_all(&[0x80, 9, 0, 1, 0, 0, 0, 0])
        .await
        .expect("server reads");
    assert_eq!(client.read().await, Read::Closed);
    timeout(LONG, serving)
        .await
        .expect("ends")
        .expect("no panic");
}

/// A server that returns what it gets, and its end.
async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = socket.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

fn forwarding() -> (Spdy<DuplexStream>, JoinHandle<()>) {
    let (client, connection) = connection();
    (
        client,
        tokio::spawn(port_forward::spdy::serve(connection, || Ok(Place::Host))),
    )
}

#[tokio::test]
async fn hundreds_of_connections_are_forwarded_at_once() {
    let port = echo_server().await.port().to_string();
    let (mut client, serving) = forwarding();
    let pairs: Vec<u32> = (0..300).collect();
    for pair in &pairs {
        let request = pair.to_string();
        let (error, data) = (pair * 4 + 1, pair * 4 + 3);
        let headers = |kind| {
            [
                ("streamtype", kind),
                ("port", &*port),
                ("requestid", &*request),
            ]
        };
        assert_eq!(
            client.open(error, headers("error")).await,
            Read::Reply(error)
        );
        assert_eq!(client.open(data, headers("data")).await, Read::Reply(data));
        client.end(error).await;
    }
    for pair in &pairs {
        client
            .send(pair * 4 + 3, format!("bytes of {pair}").as_bytes())
            .await;
        client.end(pair * 4 + 3).await;
    }
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    while ends.len() < 600 {
        match client.read().await {
            Read::Data(id, data) => bytes.push((id, data)),
            Read::End(id) => ends.push(id),
            other => panic!("{other:?}"),
        }
    }
    bytes.sort();
    let expected: Vec<_> = pairs
        .iter()
        .map(|pair| (pair * 4 + 3, Bytes::from(format!("bytes of {pair}"))))
        .collect();
    assert_eq!(bytes, expected);
    drop(client);
    serving.await.expect("no panic");
}

#[tokio::test]
async fn a_port_that_nobody_serves_is_told_and_the_connection_stays() {
    let free = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = free.local_addr().expect("address").port().to_string();
    drop(free);
    let (mut client, _serving) = forwarding();
    // Without request ids, as old clients do.
    assert_eq!(
        client
            .open(1, [("streamtype", "error"), ("port", &port)])
            .await,
        Read::Reply(1)
    );
    client.end(1).await;
    assert_eq!(
        client
            .open(3, [("streamtype", "data"), ("port", &port)])
            .await,
        Read::Reply(3)
    );
    let Read::Data(1, text) = client.read().await else {
        panic!("no text")
    };
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains(&format!("port {port} of the sandbox")) && text.contains("refused"),
        "{text}"
    );
    assert_eq!(client.read().await, Read::End(3));
    assert_eq!(client.read().await, Read::End(1));
    for (id, bad) in [(5, "0"), (7, "65536"), (9, "http")] {
        assert_eq!(
            client
                .open(id, [("streamtype", "error"), ("port", bad)])
                .await,
            Read::Reset(id, 3)
        );
    }
    let port = echo_server().await.port().to_string();
    let headers = |kind| [("streamtype", kind), ("port", &*port), ("requestid", "7")];
    assert_eq!(client.open(11, headers("data")).await, Read::Reply(11));
    assert_eq!(client.open(13, headers("error")).await, Read::Reply(13));
    client.send(11, b"still here").await;
    assert_eq!(
        client.read().await,
        Read::Data(11, Bytes::from_static(b"still here"))
    );
}

#[tokio::test]
async fn a_connection_that_is_not_read_holds_up_only_itself() {
    let deaf = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let deaf_port = deaf.local_addr().expect("address").port().to_string();
    let port = echo_server().await.port().to_string();
    let (mut client, _serving) = forwarding();
    for (id, kind, port, request) in [
        (1, "error", &deaf_port, "1"),
        (3, "data", &deaf_port, "1"),
        (5, "error", &port, "2"),
        (7, "data", &port, "2"),
    ] {
        let headers = [("streamtype", kind), ("port", port), ("requestid", request)];
        assert_eq!(client.open(id, headers).await, Read::Reply(id));
    }
    let (_held, _) = deaf.accept().await.expect("connected");
    for _ in 0..28 {
        client.send(3, &[0; 32 << 10]).await;
    }
    client.send(7, b"goes on").await;
    assert_eq!(
        client.read().await,
        Read::Data(7, Bytes::from_static(b"goes on"))
    );
}

#[tokio::test]
async fn a_reset_breaks_the_forwarded_connection_off() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = server.local_addr().expect("address").port().to_string();
    let (mut client, _serving) = forwarding();
    let headers = |kind| [("streamtype", kind), ("port", &*port), ("requestid", "0")];
    assert_eq!(client.open(1, headers("error")).await, Read::Reply(1));
    assert_eq!(client.open(3, headers("data")).await, Read::Reply(3));
    let (mut socket, _) = server.accept().await.expect("connected");
    client
        .write(|encoder, wire| encoder.reset(wire, 3, 5))
        .await;
    let read = timeout(LONG, socket.read(&mut [0])).await.expect("ends");
    assert!(matches!(read, Ok(0) | Err(_)));
    assert_eq!(client.read().await, Read::End(1));
}

async fn websocket_pair() -> (WebSocketStream<DuplexStream>, WebSocketStream<DuplexStream>) {
    let (near, far) = duplex(64 << 10);
    tokio::join!(
        WebSocketStream::from_raw_socket(near, Role::Client, None),
        WebSocketStream::from_raw_socket(far, Role::Server, Some(websocket::config())),
    )
}

async fn message(client: &mut WebSocketStream<DuplexStream>) -> Message {
    let message = timeout(LONG, client.next())
        .await
        .expect("the server answers");
    message.expect("open").expect("well formed")
}

#[tokio::test]
async fn a_command_over_websocket_with_half_close() {
    let (mut client, server) = websocket_pair().await;
    let wanted = Wanted {
        stderr: false,
        ..ALL
    };
    let serving = tokio::spawn(remote_command::websocket::serve(
        server,
        Coding::BinaryHalfClose,
        wanted,
        ErrorStyle::Status,
        Activity::new(),
        cat,
    ));
    let binary = |bytes: &'static [u8]| Message::Binary(Bytes::from_static(bytes));
    assert_eq!(message(&mut client).await, binary(b"\x01"));
    client
        .send(Message::Ping(Bytes::from_static(b"p")))
        .await
        .expect("server reads");
    client.send(binary(b"\0hello")).await.expect("server reads");
    client
        .send(binary(b"\x09unknown channel"))
        .await
        .expect("server reads");
    let both = [message(&mut client).await, message(&mut client).await];
    assert!(both.contains(&binary(b"\x01hello")), "{both:?}");
    assert!(
        both.contains(&Message::Pong(Bytes::from_static(b"p"))),
        "{both:?}"
    );
    client.send(binary(b"\xff\0")).await.expect("server reads");
    assert_eq!(message(&mut client).await, binary(b"\x03status"));
    match message(&mut client).await {
        Message::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 1000),
        other => panic!("{other:?}"),
    }
    while client.next().await.is_some_and(|message| message.is_ok()) {}
    timeout(LONG, serving)
        .await
        .expect("ends")
        .expect("no panic");
}

#[tokio::test]
async fn ports_are_forwarded_through_a_tunnel() {
    let port = echo_server().await.port().to_string();
    let (client, server) = websocket_pair().await;
    let (inside, _carry) = websocket::tunnel(server);
    let serving =
        port_forward::spdy::serve(Connection::new(inside, Activity::new()), || Ok(Place::Host));
    let _serving = tokio::spawn(serving);
    let (near, far) = duplex(64 << 10);
    let _carried = tokio::spawn(carry(client, far));
    let mut client = Spdy::new(near);
    let headers = |kind| [("streamtype", kind), ("port", &*port), ("requestid", "0")];
    assert_eq!(client.open(1, headers("error")).await, Read::Reply(1));
    assert_eq!(client.open(3, headers("data")).await, Read::Reply(3));
    let sent = vec![7; 1 << 20];
    let (mut received, mut pieces) = (0, sent.chunks(10_000));
    while received < sent.len() {
        if let Some(piece) = pieces.next() {
            client.send(3, piece).await;
        }
        match client.read().await {
            Read::Data(3, bytes) => received += bytes.len(),
            other => panic!("{other:?}"),
        }
    }
    client.end(3).await;
    assert_eq!(client.read().await, Read::End(3));
    assert_eq!(client.read().await, Read::End(1));
}

/// The client's side of a tunnel.
async fn carry(client: WebSocketStream<DuplexStream>, inside: DuplexStream) {
    let (mut to, mut from) = client.split();
    let (mut read, mut write) = tokio::io::split(inside);
    let up = async {
        let mut buffer = BytesMut::new();
        while read.read_buf(&mut buffer).await.unwrap_or(0) > 0 {
            to.send(Message::Binary(buffer.split().freeze()))
                .await
                .expect("server reads");
        }
    };
    let down = async {
        while let Some(Ok(Message::Binary(bytes))) = from.next().await {
            write.write_all(&bytes).await.expect("client reads");
        }
    };
    tokio::join!(up, down);
}

#[tokio::test]
async fn old_clients_forward_ports_on_channels() {
    let port = echo_server().await.port();
    let (mut client, server) = websocket_pair().await;
    let serving = async move {
        port_forward::websocket::serve(server, Coding::Binary, &[port], Activity::new(), || {
            Ok(Place::Host)
        })
        .await;
    };
    let _serving = tokio::spawn(serving);
    let [low, high] = port.to_le_bytes();
    assert_eq!(
        message(&mut client).await,
        Message::Binary(vec![0, low, high].into())
    );
    assert_eq!(
        message(&mut client).await,
        Message::Binary(vec![1, low, high].into())
    );
    client
        .send(Message::Binary(Bytes::from_static(b"\0hi")))
        .await
        .expect("server reads");
    assert_eq!(
        message(&mut client).await,
        Message::Binary(Bytes::from_static(b"\0hi"))
    );
}

#[tokio::test]
async fn ports_of_a_network_namespace_are_reached() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("net");
    let namespaces = longshore_sys::ns::NewNamespaces {
        net: Some(path.clone()),
        ..Default::default()
    };
    longshore_sys::ns::create(&namespaces).expect("create (tests run as root)");
    let bound = longshore_sys::ns::in_netns(&path, || {
        std::net::TcpListener::bind("[::1]:8080").and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
    });
    let listener = TcpListener::from_std(bound.expect("enter").expect("bind")).expect("register");
    let served = tokio::spawn(async move {
        let (mut socket, _): (TcpStream, _) = listener.accept().await.expect("connected");
        socket
            .write_all(b"from inside")
            .await
            .expect("client reads");
    });
    let (mut client, connection) = connection();
    let place = path.clone();
    let _serving = tokio::spawn(port_forward::spdy::serve(connection, move || {
        Ok(Place::Netns(place.clone()))
    }));
    let headers = |kind| [("streamtype", kind), ("port", "8080"), ("requestid", "0")];
    assert_eq!(client.open(1, headers("error")).await, Read::Reply(1));
    assert_eq!(client.open(3, headers("data")).await, Read::Reply(3));
    assert_eq!(
        client.read().await,
        Read::Data(3, Bytes::from_static(b"from inside"))
    );
    served.await.expect("no panic");
    longshore_sys::ns::release(&path).expect("release");
}
