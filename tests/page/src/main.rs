//! A page server for containers: `page-server [ADDRESS]` or `PAGE_ADDRESS`, by default `[::]:8080`.
//! `page-server --fetch ADDRESS` is the other side, for places that have no client;
//! `page-server --pause` does nothing, for engines that need a process to hold a pod.
//!
//! Answers each `GET` with a page that names the host and counts the requests, logs one line per
//! request on standard output, and ends with code 0 upon SIGTERM, which a process that is pid 1
//! would otherwise not even notice. Linked statically, so that an image needs nothing else.
#![forbid(unsafe_code)]

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    process::{self, ExitCode},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use nix::sys::signal::{SigSet, Signal};

static REQUESTS: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let first = args.next();
    if first.as_deref() == Some("--fetch") {
        return report("--fetch", fetch(&args.next().unwrap_or_default()));
    }
    if first.as_deref() == Some("--pause") {
        return report("--pause", pause());
    }
    let address = first
        .or_else(|| env::var("PAGE_ADDRESS").ok())
        .unwrap_or_else(|| "[::]:8080".to_owned());
    report(&address, end_on_sigterm().and_then(|()| serve(&address)))
}

fn report(what: &str, result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page-server: {what}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does nothing until SIGTERM comes.
fn pause() -> io::Result<()> {
    end_on_sigterm()?;
    loop {
        thread::park();
    }
}

/// Prints the answer of `address` to a `GET`.
fn fetch(address: &str) -> io::Result<()> {
    let limit = Duration::from_secs(10);
    let address = address.parse().map_err(io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    io::copy(&mut stream, &mut io::stdout())?;
    Ok(())
}

fn serve(address: &str) -> io::Result<()> {
    // A pod without IPv6 has no `::`.
    let listener = match TcpListener::bind(address) {
        Err(_) if address.starts_with("[::]") => {
            TcpListener::bind(address.replace("[::]", "0.0.0.0"))?
        }
        bound => bound?,
    };
    say(&format!("serving on {}", listener.local_addr()?));
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = answer(stream) {
                say(&format!("failed: {error}"));
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let peer = stream.peer_addr()?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let number = REQUESTS.fetch_add(1, Ordering::Relaxed) + 1;
    say(&format!("{number} {peer} {}", request.trim_end()));
    let page = page(number, &peer.ip().to_string());
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
        page.len()
    )
}

fn page(number: u64, peer: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!(
        "<!doctype html>\n<title>Longshore</title>\n<h1>Hello from {}</h1>\n<p>Request {number}, from {peer}.</p>\n",
        host.trim()
    )
}

/// One write per line, so that lines of several threads never mix.
fn say(line: &str) {
    let _closed = io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// Ends the process with code 0 upon SIGTERM: blocked in every thread, waited for in one.
fn end_on_sigterm() -> io::Result<()> {
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGTERM);
    wanted.thread_block()?;
    thread::spawn(move || {
        let _number = wanted.wait();
        process::exit(0);
    });
    Ok(())
}
