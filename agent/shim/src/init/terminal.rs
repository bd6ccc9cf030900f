//! A terminal from the container's own devpts, so that its name means something inside.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use longshore_sys::mount::{self, Attributes};
use longshore_sys::path::{self, Missing};
use rustix::fs::{FileType, Gid, OFlags, Uid};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::{Step, at, resolve};
use crate::wire::ProcessPlan;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS_MAGIC: u64 = 0x1cd1;

/// Both sides of a terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    /// The side that drives it: goes to the shim or the agent.
    pub(super) controlling: OwnedFd,
    /// The side that the program has.
    pub(super) program: OwnedFd,
}

/// Opens a new terminal below `root`, of the plan's size, owned by its user.
pub(super) fn open(root: &OwnedFd, process: &ProcessPlan) -> Step<Terminal> {
    at(open_pair(root, process), || "open a terminal".into())
}

fn open_pair(root: &OwnedFd, process: &ProcessPlan) -> io::Result<Terminal> {
    let controlling = path::open_in_root(root, "/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY, 0)?;
    verify_multiplexer(&controlling)?;
    rustix::pty::unlockpt(&controlling)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let program = rustix::pty::ioctl_tiocgptpeer(&controlling, flags)?;
    if process.width != 0 && process.height != 0 {
        rustix::termios::tcsetwinsize(&controlling, size(process.width, process.height))?;
    }
    rustix::fs::fchown(&program, Some(Uid::from_raw(process.uid)), None::<Gid>)?;
    Ok(Terminal {
        controlling,
        program,
    })
}

/// A size, cut to what the kernel can express.
pub(crate) fn size(width: u32, height: u32) -> Winsize {
    let cut = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
    Winsize {
        ws_row: cut(height),
        ws_col: cut(width),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Looks that it is devpts's multiplexer and nothing that an image has put in its place: what is
/// written to this descriptor is written with our rights.
pub(crate) fn verify_multiplexer(fd: &OwnedFd) -> io::Result<()> {
    let found = rustix::fs::fstat(fd)?;
    let is_multiplexer = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == rustix::fs::makedev(5, 2)
        && u64::try_from(rustix::fs::fstatfs(fd)?.f_type) == Ok(DEVPTS_MAGIC);
    if is_multiplexer {
        Ok(())
    } else {
        Err(Errno::NOTTY.into())
    }
}

/// Binds the program's side on `/dev/console`.
pub(super) fn bind_console(root: &OwnedFd, terminal: &Terminal) -> Step<()> {
    let bind = || -> io::Result<()> {
        let tree = mount::clone_tree(terminal.program.as_fd(), "", false)?;
        let private = Attributes {
            propagation: libc::MS_PRIVATE,
            ..Attributes::default()
        };
        mount::set_attributes(&tree, false, private)?;
        mount::attach(
            &tree,
            resolve(root, "/dev/console", Missing::MakeFile(0o600))?,
        )
    };
    at(bind(), || "mount /dev/console".into())
}
