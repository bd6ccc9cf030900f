use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::symlink,
    path::Path,
    pin::pin,
    time::Duration,
};

use futures_util::StreamExt as _;
use tokio::time;

use super::*;

fn options() -> LogOptions {
    LogOptions {
        follow: false,
        since: None,
        tail_lines: None,
        stdout: true,
        stderr: true,
    }
}

fn line(stream: &str, tag: &str, text: &str) -> String {
    format!("2026-03-04T05:06:07.123456789Z {stream} {tag} {text}\n")
}

fn out(text: &str) -> String {
    line("stdout", "F", text)
}

fn append(path: &Path, text: &str) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("opens");
    file.write_all(text.as_bytes()).expect("writes");
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    PathBuf::from(format!("{}.{number}", path.display()))
}

fn rotate(path: &Path, keep: u32) {
    for number in (1..keep).rev() {
        let _ = fs::rename(rotated(path, number), rotated(path, number + 1));
    }
    fs::rename(path, rotated(path, 1)).expect("renames");
}

struct Log {
    dir: tempfile::TempDir,
}

impl Log {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a directory"),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("0.log")
    }

    async fn texts(&self, options: LogOptions) -> Result<Vec<String>, LogError> {
        let (_running, watch) = signal::channel(false);
        let mut texts = Vec::new();
        let mut entries = pin!(read(self.path(), options, watch));
        while let Some(entry) = entries.next().await {
            texts.push(text(entry?));
        }
        Ok(texts)
    }
}

fn text(entry: LogEntry) -> String {
    String::from_utf8(entry.data.to_vec()).expect("tests write text")
}

/// The next texts; a test that hangs fails.
async fn take(
    entries: &mut (impl Stream<Item = Result<LogEntry, LogError>> + Unpin),
    count: usize,
) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        let entry = time::timeout(Duration::from_secs(20), entries.next()).await;
        texts.push(text(
            entry.expect("in time").expect("goes on").expect("reads"),
        ));
    }
    texts
}

async fn end(entries: &mut (impl Stream<Item = Result<LogEntry, LogError>> + Unpin)) {
    let end = time::timeout(Duration::from_secs(20), entries.next()).await;
    assert!(end.expect("in time").is_none());
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn rotated_files_come_first_and_oldest_first() {
    let log = Log::new();
    append(&rotated(&log.path(), 2), &out("0"));
    append(&rotated(&log.path(), 1), &(out("1") + &out("2")));
    append(&log.path(), &out("3"));
    append(&log.dir.path().join("0.log.20260101"), &out("other"));
    assert_eq!(log.texts(options()).await.expect("reads"), numbers(0..4));
}

#[tokio::test]
async fn a_log_larger_than_a_chunk_is_read_whole() {
    let log = Log::new();
    let all: String = (0..10_000).map(|n| out(&n.to_string())).collect();
    append(&log.path(), &all);
    assert_eq!(
        log.texts(options()).await.expect("reads"),
        numbers(0..10_000)
    );
}

#[tokio::test]
async fn the_tail_counts_lines_of_the_wished_streams() {
    let log = Log::new();
    append(
        &rotated(&log.path(), 1),
        &(out("0") + &out("1") + &line("stderr", "F", "e0")),
    );
    append(
        &log.path(),
        &[
            out("2"),
            line("stdout", "P", "3a"),
            line("stdout", "P", "3b"),
            out("3c"),
            "noise\n".to_owned(),
            line("stderr", "F", "e1"),
            out("4"),
            line("stdout", "P", "5 torn"),
        ]
        .concat(),
    );
    let all = ["0", "1", "e0", "2", "3a", "3b", "3c", "e1", "4", "5 torn"];
    for (lines, stdout, stderr, expected) in [
        (0, true, true, vec![]),
        (1, true, true, vec!["5 torn"]),
        (2, true, true, vec!["4", "5 torn"]),
        (3, true, false, vec!["3a", "3b", "3c", "4", "5 torn"]),
        (4, true, false, vec!["2", "3a", "3b", "3c", "4", "5 torn"]),
        (
            5,
            true,
            false,
            vec!["1", "2", "3a", "3b", "3c", "4", "5 torn"],
        ),
        (1, false, true, vec!["e1"]),
        (2, false, true, vec!["e0", "e1"]),
        (7, true, true, all[1..].to_vec()),
        (100, true, true, all.to_vec()),
        (u64::MAX, true, true, all.to_vec()),
    ] {
        let options = LogOptions {
            tail_lines: Some(lines),
            stdout,
            stderr,
            ..options()
        };
        assert_eq!(
            log.texts(options).await.expect("reads"),
            expected,
            "{lines} {stdout} {stderr}"
        );
    }
}

#[tokio::test]
async fn the_tail_of_a_long_log_is_found_over_chunks() {
    let log = Log::new();
    let all: String = (0..20_000).map(|n| out(&n.to_string())).collect();
    append(&log.path(), &all);
    for lines in [1, 999, 1_300, 5_000, 19_999, 20_000] {
        let options = LogOptions {
            tail_lines: Some(u64::from(lines)),
            ..options()
        };
        let found = log.texts(options).await.expect("reads");
        assert_eq!(found, numbers(20_000 - lines..20_000));
    }
}

#[tokio::test]
async fn a_followed_log_goes_on_over_rotations_and_ends_with_the_container() {
    let log = Log::new();
    let path = log.path();
    append(&path, &out("0"));
    let (running, watch) = signal::channel(true);
    let options = LogOptions {
        follow: true,
        ..options()
    };
    let mut entries = pin!(read(path.clone(), options, watch));
    assert_eq!(take(&mut entries, 1).await, ["0"]);

    append(&path, &out("1"));
    assert_eq!(take(&mut entries, 1).await, ["1"]);

    // The writer still has the old file for a moment.
    rotate(&path, 4);
    append(&path, "");
    append(&rotated(&path, 1), &out("2"));
    assert_eq!(take(&mut entries, 1).await, ["2"]);
    append(&rotated(&path, 1), &out("3"));
    append(&path, &out("4"));
    assert_eq!(take(&mut entries, 2).await, ["3", "4"]);

    // Several at once, between two looks.
    rotate(&path, 4);
    append(&path, &out("5"));
    rotate(&path, 4);
    append(&path, &out("6"));
    assert_eq!(take(&mut entries, 2).await, ["5", "6"]);

    // A tool that removes, and one that cuts.
    fs::remove_file(&path).expect("removes");
    append(&path, &out("7"));
    assert_eq!(take(&mut entries, 1).await, ["7"]);
    fs::write(&path, "").expect("cuts");
    assert!(
        time::timeout(Duration::from_millis(300), entries.next())
            .await
            .is_err()
    );
    append(&path, &out("8"));
    assert_eq!(take(&mut entries, 1).await, ["8"]);

    append(&path, &(out("9") + &out("10")));
    rotate(&path, 4);
    append(&path, &out("11"));
    running.send(false).expect("is read");
    assert_eq!(take(&mut entries, 3).await, ["9", "10", "11"]);
    end(&mut entries).await;
}

#[tokio::test]
async fn nothing_is_lost_or_doubled_while_a_writer_rotates() {
    let log = Log::new();
    let path = log.path();
    append(&path, "");
    let (running, watch) = signal::channel(true);
    let writer = {
        let path = path.clone();
        std::thread::spawn(move || {
            for n in 0..3_000_u32 {
                append(&path, &out(&n.to_string()));
                // Slow enough that the reader is not left behind by more files than are kept.
                if n % 300 == 299 {
                    std::thread::sleep(Duration::from_millis(40));
                    rotate(&path, 32);
                    append(&path, "");
                }
            }
            running.send(false).expect("is read");
        })
    };
    let options = LogOptions {
        follow: true,
        ..options()
    };
    let mut entries = pin!(read(path, options, watch));
    assert_eq!(take(&mut entries, 3_000).await, numbers(0..3_000));
    end(&mut entries).await;
    writer.join().expect("wrote");
}

#[tokio::test]
async fn a_followed_log_ends_when_nobody_can_say_whether_it_runs() {
    let log = Log::new();
    append(&log.path(), &(out("0") + "torn line"));
    let (running, watch) = signal::channel(true);
    drop(running);
    let options = LogOptions {
        follow: true,
        ..options()
    };
    let mut entries = pin!(read(log.path(), options, watch));
    assert_eq!(take(&mut entries, 1).await, ["0"]);
    end(&mut entries).await;
}

#[tokio::test]
async fn following_the_tail_begins_with_what_is_new() {
    let log = Log::new();
    append(&log.path(), &out("old"));
    let (running, watch) = signal::channel(true);
    let options = LogOptions {
        follow: true,
        tail_lines: Some(0),
        ..options()
    };
    let mut entries = pin!(read(log.path(), options, watch));
    assert!(
        time::timeout(Duration::from_millis(300), entries.next())
            .await
            .is_err()
    );
    append(&log.path(), &out("new"));
    assert_eq!(take(&mut entries, 1).await, ["new"]);
    running.send(false).expect("is read");
    end(&mut entries).await;
}

#[tokio::test]
async fn what_is_no_log_is_an_error() {
    let log = Log::new();
    assert!(matches!(
        log.texts(options()).await,
        Err(LogError::Missing { .. })
    ));
    symlink("/etc/passwd", log.path()).expect("links");
    assert!(matches!(
        log.texts(options()).await,
        Err(LogError::Read { .. })
    ));
    fs::remove_file(log.path()).expect("removes");
    fs::create_dir(log.path()).expect("makes");
    assert!(matches!(
        log.texts(options()).await,
        Err(LogError::Read { .. })
    ));
}
