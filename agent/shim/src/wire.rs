//! What the agent and a shim say to each other: frames, requests, replies, events.
//!
//! ```text
//!  agent                                   shim
//!    | -- Request (stream 1, 3, 5, ...) --> |   at most one reply each, in any order
//!    | <-------------- Reply (same stream)  |
//!    | <-------------- Event (stream 0)     |   exits of containers and execs
//! ```
//! A frame is a ten-byte header and one protobuf message. File descriptors travel as
//! `SCM_RIGHTS` beside the first byte of the frame that names them; the message says how many
//! there are (`fds`), each request says in which order. A peer that sends more, fewer, or a frame
//! longer than [`MAX_FRAME_BYTES`] is disconnected.
//!
//! The enums are closed: this file is all that the agent may know of the shim. A shim serves
//! agents whose [`VERSION`] equals its own or is one higher.

use prost::{Message, Oneof};

/// Version of this protocol; raised with each change that an older peer would misread.
pub const VERSION: u32 = 1;

/// Longest payload of a frame: a plan with a seccomp program, mounts and environment is far below.
pub const MAX_FRAME_BYTES: usize = 8 << 20;

/// Most descriptors beside one frame (the kernel's own limit is 253).
pub const MAX_FRAME_FDS: usize = 16;

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 10;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// [`Request`], agent to shim.
    Request = 1,
    /// [`Reply`], shim to agent.
    Reply = 2,
    /// [`Event`], shim to agent, stream 0.
    Event = 3,
}

/// Header of a frame: length of the payload, stream, kind; big endian, as ttrpc lays it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow.
    pub length: u32,
    /// Pairs a reply with its request; 0 for events.
    pub stream: u32,
    /// What the payload is.
    pub kind: FrameKind,
}

impl Header {
    /// Encodes the header.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&self.length.to_be_bytes());
        out[4..8].copy_from_slice(&self.stream.to_be_bytes());
        out[8] = self.kind as u8;
        out
    }

    /// Decodes a header; `None` when the kind is unknown, the length too large or a flag is set.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let kind = match bytes[8] {
            1 => FrameKind::Request,
            2 => FrameKind::Reply,
            3 => FrameKind::Event,
            _ => return None,
        };
        let length = word(0);
        (length as usize <= MAX_FRAME_BYTES && bytes[9] == 0).then_some(Self {
            length,
            stream: word(4),
            kind,
        })
    }
}

/// Header and payload of one message, ready to be written.
pub fn frame(kind: FrameKind, stream: u32, message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let header = Header {
        length: u32::try_from(length).expect("messages are far below 4 GiB"),
        stream,
        kind,
    };
    let mut out = Vec::with_capacity(HEADER_BYTES + length);
    out.extend_from_slice(&header.encode());
    message
        .encode(&mut out)
        .expect("a Vec grows to the encoded length");
    out
}

/// A wish of the agent.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Descriptors beside this frame.
    #[prost(uint32, tag = "1")]
    pub fds: u32,
    /// The wish.
    #[prost(oneof = "Ask", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")]
    pub ask: Option<Ask>,
}

/// The wishes.
#[derive(Clone, PartialEq, Oneof)]
#[allow(
    clippy::large_enum_variant,
    reason = "held one at a time, and prost makes the variants"
)]
pub enum Ask {
    /// First on every connection.
    #[prost(message, tag = "2")]
    Hello(Hello),
    /// Builds a container up to the point before its `execve`. Descriptors: the log file if `plan.log` is set.
    #[prost(message, tag = "3")]
    Create(Create),
    /// Lets a created container run its program; the reply comes once `execve` succeeded.
    #[prost(message, tag = "4")]
    Start(Named),
    /// Sends a signal.
    #[prost(message, tag = "5")]
    Signal(Signal),
    /// Runs one more process in a running container. Descriptors: stdin, stdout, stderr as the
    /// flags say; none with a terminal, whose other end comes back beside the reply.
    #[prost(message, tag = "6")]
    Exec(Exec),
    /// Connects to the stdio of a container. Descriptors: stdin (read end) if asked, stdout and
    /// stderr (write ends) if asked.
    #[prost(message, tag = "7")]
    Attach(Attach),
    /// Sets the size of a container's terminal.
    #[prost(message, tag = "8")]
    Resize(Resize),
    /// Closes the container's stdin.
    #[prost(message, tag = "9")]
    CloseStdin(Named),
    /// Goes on with another log file. Descriptors: the file.
    #[prost(message, tag = "10")]
    ReopenLog(Named),
    /// The exit of this container is committed: its record on disk may go.
    #[prost(message, tag = "11")]
    AckExit(Named),
    /// Forgets a container; what still runs of it is killed first.
    #[prost(message, tag = "12")]
    Delete(Named),
    /// Ends everything in the pod and then the shim itself.
    #[prost(message, tag = "13")]
    Shutdown(Empty),
    /// Ends an exec and what it started.
    #[prost(message, tag = "14")]
    KillExec(KillExec),
}

/// The answer to one [`Request`].
#[derive(Clone, PartialEq, Message)]
pub struct Reply {
    /// Descriptors beside this frame.
    #[prost(uint32, tag = "1")]
    pub fds: u32,
    /// The answer.
    #[prost(oneof = "Answer", tags = "2, 3, 4, 5, 6")]
    pub answer: Option<Answer>,
}

/// The answers.
#[derive(Clone, PartialEq, Oneof)]
pub enum Answer {
    /// Done, nothing to tell.
    #[prost(message, tag = "2")]
    Done(Empty),
    /// To `Hello`.
    #[prost(message, tag = "3")]
    Welcome(Welcome),
    /// To `Create` and `Exec`: the process. With a terminal, an exec's pty comes as descriptor.
    #[prost(message, tag = "4")]
    Process(Process),
    /// It did not work, and nothing of it remains.
    #[prost(message, tag = "5")]
    Failed(Failure),
    /// An OCI runtime was called and did not do it.
    #[prost(message, tag = "6")]
    OciFailed(OciFailure),
}

/// What happened by itself.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// The fact.
    #[prost(oneof = "Fact", tags = "1, 2")]
    pub fact: Option<Fact>,
}

/// The facts.
#[derive(Clone, PartialEq, Oneof)]
pub enum Fact {
    /// A container's first process ended; repeated on each connection until acknowledged. Until
    /// then `DIR/exits/<container id>` holds the encoded [`Exited`] too.
    #[prost(message, tag = "1")]
    Exited(Exited),
    /// An exec ended. All that it wrote is in its pipes before this is sent.
    #[prost(message, tag = "2")]
    ExecExited(ExecExited),
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Empty {}

/// A container.
#[derive(Clone, PartialEq, Message)]
pub struct Named {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
}

/// Who calls.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// The agent's [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
}

/// Who answers, and all that it knows.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The shim's [`VERSION`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Pid of the shim in the agent's namespace.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// Containers that it holds, in the order of their creation.
    #[prost(message, repeated, tag = "3")]
    pub containers: Vec<ContainerReport>,
    /// Pid of the first process of the pod's shared pid namespace; 0 while there is none.
    #[prost(int32, tag = "4")]
    pub pod_init_pid: i32,
}

/// What a shim knows of a container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerReport {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Its first process; 0 once it ended.
    #[prost(int32, tag = "2")]
    pub pid: i32,
    /// `Start` succeeded at some time.
    #[prost(bool, tag = "3")]
    pub started: bool,
    /// How it ended.
    #[prost(message, optional, tag = "4")]
    pub exit: Option<ExitStatus>,
}

/// A process in the agent's pid namespace.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Process {
    /// Its pid.
    #[prost(int32, tag = "1")]
    pub pid: i32,
}

/// Why a request did not work.
#[derive(Clone, PartialEq, Message)]
pub struct Failure {
    /// What was being done, e.g. `mount /proc`, `execve /bin/sh`, `unknown container`.
    #[prost(string, tag = "1")]
    pub step: String,
    /// The error number; 0 when no system call failed.
    #[prost(int32, tag = "2")]
    pub errno: i32,
}

/// Why an OCI runtime did not do what it was called for; nothing of it remains.
#[derive(Clone, PartialEq, Message)]
pub struct OciFailure {
    /// Program and command, e.g. `runc create`.
    #[prost(string, tag = "1")]
    pub command: String,
    /// What is known of its end, e.g. `exit code 1`, `no end within 60 s`.
    #[prost(string, tag = "2")]
    pub end: String,
    /// What it logged: JSON lines, the last ones if there were many.
    #[prost(bytes = "vec", tag = "3")]
    pub log: Vec<u8>,
    /// What it wrote to its standard error, the beginning.
    #[prost(bytes = "vec", tag = "4")]
    pub stderr: Vec<u8>,
    /// It was ended because its time was over.
    #[prost(bool, tag = "5")]
    pub overdue: bool,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ExitStatus {
    /// Exit code, if it exited.
    #[prost(uint32, tag = "1")]
    pub code: u32,
    /// Signal that ended it; 0 if it exited.
    #[prost(uint32, tag = "2")]
    pub signal: u32,
    /// Wall clock, nanoseconds since 1970.
    #[prost(int64, tag = "3")]
    pub at_unix_ns: i64,
    /// Boot clock, nanoseconds.
    #[prost(uint64, tag = "4")]
    pub at_boot_ns: u64,
}

/// A container ended.
#[derive(Clone, PartialEq, Message)]
pub struct Exited {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// How.
    #[prost(message, required, tag = "2")]
    pub status: ExitStatus,
}

/// An exec ended.
#[derive(Clone, PartialEq, Message)]
pub struct ExecExited {
    /// Id that the agent gave it.
    #[prost(uint64, tag = "1")]
    pub exec_id: u64,
    /// How.
    #[prost(message, required, tag = "2")]
    pub status: ExitStatus,
    /// The shim ended it because its time was over.
    #[prost(bool, tag = "3")]
    pub timed_out: bool,
}

/// Ends an exec.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct KillExec {
    /// Id that the agent gave it.
    #[prost(uint64, tag = "1")]
    pub exec_id: u64,
}

/// A signal for a container.
#[derive(Clone, PartialEq, Message)]
pub struct Signal {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Number of the signal.
    #[prost(int32, tag = "2")]
    pub signal: i32,
}

/// A terminal's size in character cells.
#[derive(Clone, PartialEq, Message)]
pub struct Resize {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Columns.
    #[prost(uint32, tag = "2")]
    pub width: u32,
    /// Rows.
    #[prost(uint32, tag = "3")]
    pub height: u32,
}

/// Stdio of a container.
#[derive(Clone, PartialEq, Message)]
pub struct Attach {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// A stdin descriptor is beside the frame.
    #[prost(bool, tag = "2")]
    pub stdin: bool,
    /// A stdout descriptor is beside the frame. A terminal writes only there.
    #[prost(bool, tag = "3")]
    pub stdout: bool,
    /// A stderr descriptor is beside the frame.
    #[prost(bool, tag = "4")]
    pub stderr: bool,
    /// Begin with the kept output of a console.
    #[prost(bool, tag = "5")]
    pub replay: bool,
}

/// One more process.
#[derive(Clone, PartialEq, Message)]
pub struct Exec {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// Chosen by the agent, unique for the life of the pod.
    #[prost(uint64, tag = "2")]
    pub exec_id: u64,
    /// The process.
    #[prost(message, required, tag = "3")]
    pub process: ProcessPlan,
    /// Where it goes: pid 1's cgroups, and below them the leaf that names what it starts.
    #[prost(message, required, tag = "4")]
    pub cgroup: CgroupPlan,
    /// Milliseconds after which all of it is killed; 0 for none.
    #[prost(uint64, tag = "5")]
    pub timeout_ms: u64,
    /// A stdin descriptor is beside the frame.
    #[prost(bool, tag = "6")]
    pub stdin: bool,
    /// A stdout descriptor is beside the frame.
    #[prost(bool, tag = "7")]
    pub stdout: bool,
    /// A stderr descriptor is beside the frame.
    #[prost(bool, tag = "8")]
    pub stderr: bool,
    /// Of a container that an OCI runtime built: what its `exec` is given. Of `process` only the
    /// terminal counts then.
    #[prost(message, optional, tag = "9")]
    pub oci: Option<OciProcess>,
}

/// A container to build.
#[derive(Clone, PartialEq, Message)]
pub struct Create {
    /// Id of the container.
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// All that is to be done, in the order of the fields of [`ContainerPlan`].
    #[prost(message, required, tag = "2")]
    pub plan: ContainerPlan,
    /// Built by an OCI runtime instead of the engine. Of `plan` only cgroup, namespaces, rootfs,
    /// stdin, log and the process's terminal count then.
    #[prost(message, optional, tag = "3")]
    pub oci: Option<OciContainer>,
}

/// A container for an OCI runtime.
#[derive(Clone, PartialEq, Message)]
pub struct OciContainer {
    /// Absolute path of the runtime's program.
    #[prost(string, tag = "1")]
    pub program: String,
    /// The container's own directory on the host: its bundle, and below `state` what the runtime
    /// keeps.
    #[prost(string, tag = "2")]
    pub dir: String,
    /// The bundle's `config.json`. It finds its root at `plan.rootfs.mount_point`, a pid
    /// namespace that is not its own at `DIR/pidns`, and staged sources where `staged` says.
    #[prost(bytes = "vec", tag = "3")]
    pub config: Vec<u8>,
    /// Mounts whose sources the runtime can't take by itself, put where it is told to find them:
    /// what still spreads to the host, and all that comes from the host into a user namespace.
    #[prost(message, repeated, tag = "4")]
    pub staged: Vec<Staged>,
    /// Hierarchies that the runtime is not to see.
    #[prost(message, repeated, tag = "5")]
    pub hidden: Vec<HiddenHierarchy>,
}

/// A mount source that is put elsewhere for an OCI runtime.
#[derive(Clone, PartialEq, Message)]
pub struct Staged {
    /// A bind mount, or an overlay of layers; its target plays no part.
    #[prost(message, required, tag = "1")]
    pub mount: Mount,
    /// Name below `DIR/mounts`.
    #[prost(string, tag = "2")]
    pub name: String,
}

/// A cgroup hierarchy that is hidden from an OCI runtime: what it starts stays where the shim has
/// put it.
#[derive(Clone, PartialEq, Message)]
pub struct HiddenHierarchy {
    /// Where it is mounted.
    #[prost(string, tag = "1")]
    pub mount: String,
    /// The container's directory below it.
    #[prost(string, tag = "2")]
    pub dir: String,
}

/// One more process for an OCI runtime.
#[derive(Clone, PartialEq, Message)]
pub struct OciProcess {
    /// The OCI process, JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub process: Vec<u8>,
    /// Version 2: name of the leaf below the container's cgroup; empty for none.
    #[prost(string, tag = "2")]
    pub leaf: String,
}

/// A container, lowered to system calls; what the OCI runtime specification calls a bundle.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerPlan {
    /// Cgroups that the first process joins before anything else.
    #[prost(message, required, tag = "1")]
    pub cgroup: CgroupPlan,
    /// Namespaces; kinds that are missing stay the host's.
    #[prost(message, repeated, tag = "2")]
    pub namespaces: Vec<Namespace>,
    /// Host name to set, in a new UTS namespace only.
    #[prost(string, tag = "3")]
    pub hostname: String,
    /// The root.
    #[prost(message, required, tag = "4")]
    pub rootfs: Rootfs,
    /// `MS_*` propagation of the root while mounts are made: private unless a mount needs more.
    #[prost(enumeration = "Propagation", tag = "5")]
    pub root_propagation: i32,
    /// Mounts, in order.
    #[prost(message, repeated, tag = "6")]
    pub mounts: Vec<Mount>,
    /// Device nodes below `/dev`.
    #[prost(message, repeated, tag = "7")]
    pub devices: Vec<Device>,
    /// Kernel parameters of the new namespaces, written through a private proc.
    #[prost(message, repeated, tag = "8")]
    pub sysctls: Vec<Sysctl>,
    /// Covered by an empty directory or `/dev/null`; missing ones are skipped.
    #[prost(string, repeated, tag = "9")]
    pub masked_paths: Vec<String>,
    /// Made read-only; missing ones are skipped.
    #[prost(string, repeated, tag = "10")]
    pub readonly_paths: Vec<String>,
    /// The root mount itself becomes read-only, last.
    #[prost(bool, tag = "11")]
    pub readonly_rootfs: bool,
    /// The first process.
    #[prost(message, required, tag = "12")]
    pub process: ProcessPlan,
    /// Keep a pipe to its stdin (or let the terminal take input).
    #[prost(bool, tag = "13")]
    pub stdin: bool,
    /// Close its stdin when the first attached client has gone.
    #[prost(bool, tag = "14")]
    pub stdin_once: bool,
    /// A log file is beside the frame.
    #[prost(message, optional, tag = "15")]
    pub log: Option<Log>,
    /// The pod's user namespace: joined, its root's ids taken, and all new namespaces made in it.
    #[prost(message, optional, tag = "16")]
    pub user_namespace: Option<UserNamespace>,
    /// Its terminal is the console of an init, which takes no terminal for itself, and this many
    /// bytes of its output are kept for those who attach later; 0 for a terminal as any other.
    #[prost(uint32, tag = "17")]
    pub console_bytes: u32,
    /// Files written to the root first.
    #[prost(message, repeated, tag = "18")]
    pub files: Vec<File>,
    /// Writable though they are below a read-only path; missing ones are skipped.
    #[prost(string, repeated, tag = "19")]
    pub writable_paths: Vec<String>,
}

/// A file of the root. Links, and anything but a plain file, are left alone.
#[derive(Clone, PartialEq, Message)]
pub struct File {
    /// Absolute path inside the container.
    #[prost(string, tag = "1")]
    pub path: String,
    /// What it is to hold.
    #[prost(bytes = "vec", tag = "2")]
    pub content: Vec<u8>,
    /// Permission bits if it has to be made.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// Whatever it holds; else only if its first line is that of `content`.
    #[prost(bool, tag = "4")]
    pub overwrite: bool,
}

/// A user namespace that exists.
#[derive(Clone, PartialEq, Message)]
pub struct UserNamespace {
    /// Path of its `nsfs` mount.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Its users.
    #[prost(message, repeated, tag = "2")]
    pub uid_mappings: Vec<IdMapping>,
    /// Its groups.
    #[prost(message, repeated, tag = "3")]
    pub gid_mappings: Vec<IdMapping>,
}

/// A range of ids in a user namespace.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct IdMapping {
    /// First id inside.
    #[prost(uint32, tag = "1")]
    pub inside: u32,
    /// First id on the host.
    #[prost(uint32, tag = "2")]
    pub outside: u32,
    /// How many.
    #[prost(uint32, tag = "3")]
    pub length: u32,
}

impl UserNamespace {
    /// Its users, as the kernel's door knows them.
    pub fn uids(&self) -> Vec<longshore_sys::user::IdMapping> {
        self.uid_mappings.iter().map(IdMapping::known).collect()
    }

    /// Its groups.
    pub fn gids(&self) -> Vec<longshore_sys::user::IdMapping> {
        self.gid_mappings.iter().map(IdMapping::known).collect()
    }
}

impl IdMapping {
    fn known(&self) -> longshore_sys::user::IdMapping {
        longshore_sys::user::IdMapping {
            inside: self.inside,
            outside: self.outside,
            length: self.length,
        }
    }
}

/// A CRI log.
#[derive(Clone, PartialEq, Message)]
pub struct Log {
    /// Path of the file, for rotation by the shim.
    #[prost(string, tag = "1")]
    pub path: String,
    /// Size in bytes at which the shim rotates by itself; 0 leaves that to whoever owns the log.
    #[prost(uint64, tag = "2")]
    pub rotate_bytes: u64,
    /// Rotated files to keep, `path.1` being the newest.
    #[prost(uint32, tag = "3")]
    pub keep_files: u32,
}

/// Cgroups to join. A single-threaded child writes `0` to each file, which costs nothing.
#[derive(Clone, PartialEq, Message)]
pub struct CgroupPlan {
    /// Version 1: `tasks` files, `cpuset` first.
    #[prost(string, repeated, tag = "1")]
    pub v1_tasks: Vec<String>,
    /// Version 2 (on hybrid hosts too): directory for `CLONE_INTO_CGROUP`; empty for none.
    #[prost(string, tag = "2")]
    pub v2_dir: String,
    /// Version 1 exec only: directory of the leaf in the freezer hierarchy, made by the agent.
    #[prost(string, tag = "3")]
    pub v1_freezer_leaf: String,
}

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NamespaceKind {
    /// `CLONE_NEWNS`
    Mount = 0,
    /// `CLONE_NEWPID`
    Pid = 1,
    /// `CLONE_NEWNET`
    Network = 2,
    /// `CLONE_NEWUTS`
    Uts = 3,
    /// `CLONE_NEWIPC`
    Ipc = 4,
    /// `CLONE_NEWCGROUP`
    Cgroup = 5,
    /// `CLONE_NEWUSER`; a container's is said apart, see [`ContainerPlan::user_namespace`].
    User = 6,
}

/// One namespace of a container.
#[derive(Clone, PartialEq, Message)]
pub struct Namespace {
    /// Its kind.
    #[prost(enumeration = "NamespaceKind", tag = "1")]
    pub kind: i32,
    /// Where it comes from.
    #[prost(oneof = "NamespaceFrom", tags = "2, 3, 4, 5")]
    pub from: Option<NamespaceFrom>,
}

/// Where a namespace comes from.
#[derive(Clone, PartialEq, Oneof)]
pub enum NamespaceFrom {
    /// Made for this container.
    #[prost(message, tag = "2")]
    New(Empty),
    /// Joined by path (`nsfs` mount or `/proc/PID/ns/KIND`).
    #[prost(string, tag = "3")]
    Path(String),
    /// Pid only: the pod's shared one, whose first process the shim makes on first use.
    #[prost(message, tag = "4")]
    Pod(Empty),
    /// Pid only: that of another container of the same pod.
    #[prost(string, tag = "5")]
    Container(String),
}

/// Root of a container.
#[derive(Clone, PartialEq, Message)]
pub struct Rootfs {
    /// An existing empty directory on the host: where the root is put together, inside the
    /// container's own mount namespace, so that the host never sees these mounts.
    #[prost(string, tag = "1")]
    pub mount_point: String,
    /// Lower directories, topmost first, relative to `layers_dir`. Never empty.
    #[prost(string, repeated, tag = "2")]
    pub lower: Vec<String>,
    /// Directory that `lower` is relative to; short names keep many layers within one page.
    #[prost(string, tag = "3")]
    pub layers_dir: String,
    /// Writable layer; empty for a root without one.
    #[prost(string, tag = "4")]
    pub upper: String,
    /// Overlay's work directory beside `upper`.
    #[prost(string, tag = "5")]
    pub work: String,
    /// The writable layer is used again by a later container, also after the machine lost power.
    #[prost(bool, tag = "6")]
    pub durable: bool,
}

/// Mount propagation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Propagation {
    /// `MS_PRIVATE`
    Private = 0,
    /// `MS_SLAVE`
    Slave = 1,
    /// `MS_SHARED`
    Shared = 2,
}

/// A mount inside the root. The target is resolved inside the root and made if it is missing.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    /// Absolute path inside the container.
    #[prost(string, tag = "1")]
    pub target: String,
    /// Path on the host for a bind mount, else the kernel's source word.
    #[prost(string, tag = "2")]
    pub source: String,
    /// File system type (`proc`, `tmpfs`, `sysfs`, `devpts`, `mqueue`, `cgroup`, `cgroup2`, ...); empty for a bind mount.
    #[prost(string, tag = "3")]
    pub fs_type: String,
    /// `MS_*` flags of mount(2) except bind and propagation: read-only, nosuid, nodev, noexec, relatime, strictatime.
    #[prost(uint64, tag = "4")]
    pub flags: u64,
    /// Data for the file system.
    #[prost(string, tag = "5")]
    pub data: String,
    /// Bind: with the mounts below.
    #[prost(bool, tag = "6")]
    pub recursive: bool,
    /// Bind: read-only for the mounts below too (mount_setattr, AT_RECURSIVE).
    #[prost(bool, tag = "7")]
    pub recursive_readonly: bool,
    /// Propagation of the finished mount.
    #[prost(enumeration = "Propagation", tag = "8")]
    pub propagation: i32,
    /// Bind: owners are mapped by the container's user namespace, in mounts below too if recursive.
    #[prost(bool, tag = "9")]
    pub id_mapped: bool,
}

/// A device node.
#[derive(Clone, PartialEq, Message)]
pub struct Device {
    /// Absolute path inside the container.
    #[prost(string, tag = "1")]
    pub path: String,
    /// A block device, else a character device.
    #[prost(bool, tag = "2")]
    pub block: bool,
    /// Major number.
    #[prost(uint32, tag = "3")]
    pub major: u32,
    /// Minor number.
    #[prost(uint32, tag = "4")]
    pub minor: u32,
    /// Permission bits.
    #[prost(uint32, tag = "5")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "6")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "7")]
    pub gid: u32,
}

/// A kernel parameter.
#[derive(Clone, PartialEq, Message)]
pub struct Sysctl {
    /// Dotted name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// A process, as both a container's first one and an exec get it.
#[derive(Clone, PartialEq, Message)]
pub struct ProcessPlan {
    /// Program and arguments; `args[0]` is looked up in the PATH of `env` inside the root.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub args: Vec<Vec<u8>>,
    /// `NAME=value`, any octets but NUL.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub env: Vec<Vec<u8>>,
    /// Working directory; made if missing (first process only).
    #[prost(string, tag = "3")]
    pub cwd: String,
    /// User.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// Supplemental groups.
    #[prost(uint32, repeated, tag = "6")]
    pub additional_gids: Vec<u32>,
    /// Capability sets as bit masks.
    #[prost(message, required, tag = "7")]
    pub capabilities: Capabilities,
    /// `PR_SET_NO_NEW_PRIVS`.
    #[prost(bool, tag = "8")]
    pub no_new_privs: bool,
    /// Resource limits.
    #[prost(message, repeated, tag = "9")]
    pub rlimits: Vec<Rlimit>,
    /// Classic BPF program, eight bytes an instruction in host order; empty for none.
    #[prost(bytes = "vec", tag = "10")]
    pub seccomp: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    #[prost(uint32, tag = "11")]
    pub seccomp_flags: u32,
    /// OOM score adjustment; clamped up to what the kernel lets us set.
    #[prost(int32, optional, tag = "12")]
    pub oom_score_adj: Option<i32>,
    /// AppArmor profile to change to at exec; empty for none.
    #[prost(string, tag = "13")]
    pub apparmor_profile: String,
    /// SELinux label for exec; empty for none.
    #[prost(string, tag = "14")]
    pub selinux_label: String,
    /// On a terminal.
    #[prost(bool, tag = "15")]
    pub terminal: bool,
    /// Columns of that terminal; 0 leaves the kernel's.
    #[prost(uint32, tag = "16")]
    pub width: u32,
    /// Rows of that terminal.
    #[prost(uint32, tag = "17")]
    pub height: u32,
    /// File mode creation mask; 022 unless set.
    #[prost(uint32, optional, tag = "18")]
    pub umask: Option<u32>,
}

/// Capability sets, bit n for capability n (capabilities(7)).
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Capabilities {
    /// Bounding set.
    #[prost(uint64, tag = "1")]
    pub bounding: u64,
    /// Permitted set.
    #[prost(uint64, tag = "2")]
    pub permitted: u64,
    /// Effective set.
    #[prost(uint64, tag = "3")]
    pub effective: u64,
    /// Inheritable set.
    #[prost(uint64, tag = "4")]
    pub inheritable: u64,
    /// Ambient set.
    #[prost(uint64, tag = "5")]
    pub ambient: u64,
}

/// A resource limit.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Rlimit {
    /// `RLIMIT_*` number.
    #[prost(uint32, tag = "1")]
    pub resource: u32,
    /// Soft limit; `u64::MAX` for unlimited.
    #[prost(uint64, tag = "2")]
    pub soft: u64,
    /// Hard limit.
    #[prost(uint64, tag = "3")]
    pub hard: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_a_round_trip() {
        let header = Header {
            length: 77,
            stream: 9,
            kind: FrameKind::Reply,
        };
        assert_eq!(Header::decode(header.encode()), Some(header));
    }

    #[test]
    fn header_with_unknown_kind_flag_or_too_long_is_refused() {
        let good = Header {
            length: 1,
            stream: 1,
            kind: FrameKind::Request,
        }
        .encode();
        for (at, value) in [(8, 9), (9, 1), (0, 0xff)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Header::decode(bad), None, "byte {at} = {value}");
        }
    }
}
