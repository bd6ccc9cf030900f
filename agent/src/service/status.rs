//! Every domain error becomes a gRPC status here, and nowhere else.
//!
//! Each match is exhaustive: a new variant asks for its code. Details are `google.rpc.ErrorInfo`
//! with a stable reason (`longshore.v1.ErrorReason`), and `BadRequest` for a field.

use std::{collections::HashMap, error::Error};

use longshore_proto::longshore::v1::{ERROR_DOMAIN, ErrorReason};
use rustix::io::Errno;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::edge::EdgeError;
use crate::{
    cgroup::CgroupError,
    event::EventError,
    handler::{Blame, HandlerError},
    image::ImageError,
    lifecycle::{
        LifecycleError,
        spec::{CdiError, SpecError},
        system::SystemError,
    },
    network::{
        NetworkError,
        cni::{CniError, Verb},
    },
    rootfs::{LayerError, RootfsError},
    store::StoreError,
};

/// An error that a caller can be told.
pub trait ToStatus: Error {
    /// Code, reason and facts.
    fn verdict(&self) -> Verdict;

    /// The status. `Internal` errors are logged with their whole chain, which callers do not see.
    fn to_status(&self) -> Status
    where
        Self: Sized,
    {
        let verdict = self.verdict();
        let message = chain(self);
        if verdict.code == Code::Internal {
            tracing::error!(error = message, "internal error");
        }
        verdict.status(message)
    }
}

/// What a caller is told of an error beside its words.
pub struct Verdict {
    code: Code,
    reason: ErrorReason,
    facts: HashMap<String, String>,
}

impl Verdict {
    pub(super) fn new(code: Code, reason: ErrorReason) -> Self {
        Self {
            code,
            reason,
            facts: HashMap::new(),
        }
    }

    pub(super) fn fact(mut self, key: &str, value: impl ToString) -> Self {
        self.facts.insert(key.to_owned(), value.to_string());
        self
    }

    fn status(self, message: String) -> Status {
        let mut details = ErrorDetails::new();
        if let Some(field) = self.facts.get("field") {
            details.add_bad_request_violation(field.clone(), message.clone());
        }
        details.set_error_info(self.reason.as_reason(), ERROR_DOMAIN, self.facts);
        Status::with_error_details(self.code, message, details)
    }
}

/// The error and its causes in one line, each said once.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

impl ToStatus for EdgeError {
    fn verdict(&self) -> Verdict {
        let code = match self {
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Invalid { .. } | Self::Missing { .. } | Self::Conflict { .. } => {
                Code::InvalidArgument
            }
            Self::Mount { source, .. } => return source.verdict(),
        };
        let verdict = Verdict::new(code, self.reason());
        match self {
            Self::Mount { source, .. } => source.verdict(),
            Self::Invalid {
                field,
                value,
                expected,
            } => verdict
                .fact("field", field)
                .fact("value", value)
                .fact("expected", expected),
            Self::Missing { field } => verdict.fact("field", field),
            Self::Conflict { field, other } => verdict.fact("field", field).fact("other", other),
            Self::Unsupported { feature, missing } => {
                verdict.fact("feature", feature).fact("needs", missing)
            }
        }
    }
}

impl ToStatus for LifecycleError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::NotFound { kind, id } => {
                let reason = match *kind {
                    "sandbox" => ErrorReason::SandboxNotFound,
                    "system container" => ErrorReason::SystemNotFound,
                    _ => ErrorReason::ContainerNotFound,
                };
                Verdict::new(Code::NotFound, reason).fact("id", id)
            }
            Self::Ambiguous { kind, prefix, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::AmbiguousId)
                    .fact("kind", kind)
                    .fact("id", prefix)
            }
            Self::NameTaken { name, holder } => {
                Verdict::new(Code::AlreadyExists, ErrorReason::NameTaken)
                    .fact("name", name)
                    .fact("holder", holder)
            }
            Self::State {
                kind,
                id,
                state,
                wanted,
            } => {
                let reason = match *kind {
                    "sandbox" => ErrorReason::SandboxState,
                    "system container" => ErrorReason::SystemState,
                    _ => ErrorReason::ContainerState,
                };
                Verdict::new(Code::FailedPrecondition, reason)
                    .fact("id", id)
                    .fact("state", state)
                    .fact("required", wanted)
            }
            Self::UnknownHandler { name, known } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::UnknownHandler)
                    .fact("handler", name)
                    .fact("known", known.join(", "))
                    .fact("field", "runtime_handler")
            }
            Self::UserNamespaces { handler, .. } => {
                Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                    .fact("feature", "user namespaces")
                    .fact("handler", handler)
            }
            Self::ImageMissing { reference } => {
                Verdict::new(Code::NotFound, ErrorReason::ImageNotFound).fact("image", reference)
            }
            Self::ImageVolume {
                reference, source, ..
            } => source.verdict().fact("image", reference),
            Self::SubPathMissing { sub_path } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::MountSource)
                    .fact("path", sub_path)
            }
            Self::Lacks { id, what } => {
                let reason = match *what {
                    "stdin" => ErrorReason::NoStdin,
                    "log" => ErrorReason::NoLog,
                    _ => ErrorReason::TerminalMismatch,
                };
                Verdict::new(Code::FailedPrecondition, reason).fact("id", id)
            }
            Self::ExecTimeout { after } => {
                Verdict::new(Code::DeadlineExceeded, ErrorReason::Deadline)
                    .fact("stage", "exec")
                    .fact("stage_seconds", after.as_secs_f64())
            }
            Self::System(error) => error.verdict(),
            Self::Spec(error) => error.verdict(),
            Self::Image(error) => error.verdict(),
            Self::Network(error) => error.verdict(),
            Self::Cgroup(error) => error.verdict(),
            Self::Rootfs(error) => error.verdict(),
            Self::Handler(error) => error.verdict(),
            Self::Namespace { step, source } => system(step, source),
            Self::File { action, source, .. } => system(action, source),
            Self::Store(error) => error.verdict(),
            Self::Cancelled { operation } => {
                Verdict::new(Code::Aborted, ErrorReason::Preempted).fact("operation", operation)
            }
            Self::Died { operation } => {
                Verdict::new(Code::Internal, ErrorReason::System).fact("step", operation)
            }
            Self::Shared(error) => error.verdict(),
        }
    }
}

impl ToStatus for SystemError {
    fn verdict(&self) -> Verdict {
        let refused = |reason| Verdict::new(Code::FailedPrecondition, reason);
        match self {
            Self::NoInit { image, candidates } => refused(ErrorReason::NoInit)
                .fact("image", image)
                .fact("candidates", candidates.join(", ")),
            Self::Handler { handler } => {
                Verdict::new(Code::Unimplemented, ErrorReason::NotImplemented)
                    .fact("feature", "system containers")
                    .fact("handler", handler)
            }
            Self::InitEnded {
                name,
                exit,
                console,
            } => refused(ErrorReason::InitEnded)
                .fact("id", name)
                .fact("exit_code", exit.code)
                .fact("signal", exit.signal)
                .fact("console", console),
            Self::HalfConfigured { .. } | Self::TooFewIds { .. } | Self::BadIdLine { .. } => {
                refused(ErrorReason::IdRanges)
            }
            Self::IdsExhausted { .. } => {
                Verdict::new(Code::ResourceExhausted, ErrorReason::IdRanges)
            }
            Self::IdFile { source, .. } => system("read", source),
        }
    }
}

impl ToStatus for SpecError {
    fn verdict(&self) -> Verdict {
        let invalid = |field: &str| {
            Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField).fact("field", field)
        };
        match self {
            Self::NoCommand => Verdict::new(Code::FailedPrecondition, ErrorReason::NoCommand),
            Self::UnknownUser { name } | Self::UnknownGroup { name } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::UnknownUser).fact("user", name)
            }
            Self::GroupWithoutUser { .. } => invalid("config.linux.security_context.run_as_group"),
            Self::InvalidValue {
                field,
                value,
                expected,
            } => invalid(field)
                .fact("value", value)
                .fact("expected", expected),
            Self::MountSource { path, .. }
            | Self::MountPropagation { path, .. }
            | Self::Device { path, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::MountSource)
                    .fact("path", path.display())
            }
            Self::ImageVolumePath { path } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::MountSource).fact("path", path)
            }
            Self::IdMappedMount {
                path, file_system, ..
            } => Verdict::new(Code::FailedPrecondition, ErrorReason::KernelLacks)
                .fact("feature", "id-mapped mounts")
                .fact("file_system", file_system)
                .fact("path", path.display()),
            Self::RecursiveReadonly { target, .. } => {
                invalid("config.mounts.recursive_read_only").fact("value", target.display())
            }
            Self::UnknownCapability { name } => {
                invalid("config.linux.security_context.capabilities").fact("value", name)
            }
            Self::Cdi(error) => error.verdict(),
            Self::SeccompMissing => Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                .fact("feature", "seccomp"),
            Self::SeccompProfile { profile, .. } => {
                invalid("config.linux.security_context.seccomp").fact("value", profile)
            }
            Self::AppArmorMissing { profile } | Self::AppArmorProfile { profile } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::KernelLacks)
                    .fact("feature", "AppArmor")
                    .fact("profile", profile)
            }
            Self::SelinuxUnsupported => {
                Verdict::new(Code::Unimplemented, ErrorReason::NotImplemented)
                    .fact("feature", "SELinux labels")
            }
            Self::PrivilegedInUnprivilegedSandbox => {
                invalid("config.linux.security_context.privileged")
            }
        }
    }
}

impl ToStatus for CdiError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Unresolvable { name, .. }
            | Self::Ambiguous { name, .. }
            | Self::Edit { name, .. }
            | Self::Node { name, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::MountSource)
                    .fact("device", name)
            }
            Self::Unsupported { name, feature } => {
                Verdict::new(Code::Unimplemented, ErrorReason::NotImplemented)
                    .fact("feature", feature)
                    .fact("device", name)
            }
        }
    }
}

impl ToStatus for StoreError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Claimed { key, holder } => {
                Verdict::new(Code::AlreadyExists, ErrorReason::NameTaken)
                    .fact("name", key)
                    .fact("holder", holder)
            }
            Self::Newer { .. } | Self::Damaged { .. } => {
                Verdict::new(Code::DataLoss, ErrorReason::StoreDamaged)
            }
            Self::Full => Verdict::new(Code::ResourceExhausted, ErrorReason::DiskFull),
            Self::Io { action, .. } => {
                Verdict::new(Code::Internal, ErrorReason::System).fact("step", action)
            }
            Self::Closed => Verdict::new(Code::Unavailable, ErrorReason::Draining),
        }
    }
}

impl ToStatus for EventError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::CursorExpired { oldest, .. } => {
                Verdict::new(Code::OutOfRange, ErrorReason::CursorExpired)
                    .fact("oldest_epoch", oldest.epoch)
                    .fact("oldest_number", oldest.number)
            }
            Self::CursorUnknown { newest, .. } => {
                Verdict::new(Code::OutOfRange, ErrorReason::CursorUnknown)
                    .fact("newest_epoch", newest.epoch)
                    .fact("newest_number", newest.number)
            }
            Self::Unreadable { .. } => Verdict::new(Code::DataLoss, ErrorReason::StoreDamaged),
            Self::Closed => Verdict::new(Code::Unavailable, ErrorReason::Draining),
        }
    }
}

impl ToStatus for NetworkError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::UnknownNetwork { network } => {
                Verdict::new(Code::NotFound, ErrorReason::NetworkNotFound).fact("network", network)
            }
            Self::PortTaken {
                port,
                protocol,
                holder,
                ..
            } => Verdict::new(Code::FailedPrecondition, ErrorReason::HostPortTaken)
                .fact("port", port)
                .fact("protocol", protocol)
                .fact("holder", holder),
            Self::PortInvalid { index, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                    .fact("field", format!("config.port_mappings[{index}]"))
            }
            Self::AddressTaken {
                address, holder, ..
            } => Verdict::new(Code::FailedPrecondition, ErrorReason::AddressTaken)
                .fact("address", address)
                .fact("holder", holder),
            Self::AddressInvalid { address, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                    .fact("field", "config.network.addresses")
                    .fact("value", address)
            }
            Self::PoolEmpty { network, .. } => {
                Verdict::new(Code::ResourceExhausted, ErrorReason::AddressesExhausted)
                    .fact("network", network)
            }
            Self::SubnetOverlap { subnet, route, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::SubnetOverlap)
                    .fact("subnet", subnet)
                    .fact("route", route)
            }
            Self::NoSubnet | Self::ForeignLink { .. } | Self::Config { .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::SubnetOverlap)
            }
            Self::Missing { feature, hint } => {
                Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                    .fact("feature", feature)
                    .fact("needs", hint)
            }
            Self::NotStarted => Verdict::new(Code::Unavailable, ErrorReason::Starting),
            Self::Kernel { call, source, .. } | Self::File { call, source, .. } => {
                system(call, source)
            }
            Self::Cni(error) => error.verdict(),
            Self::Store(error) => error.verdict(),
        }
    }
}

impl ToStatus for CniError {
    fn verdict(&self) -> Verdict {
        let plugin = |code, plugin: &str, network: &str, verb: &Verb| {
            Verdict::new(code, ErrorReason::NetworkPlugin)
                .fact("plugin", plugin)
                .fact("network", network)
                .fact("command", verb)
        };
        match self {
            Self::NoConf { folder, .. } => {
                Verdict::new(Code::Unavailable, ErrorReason::NetworkNotReady)
                    .fact("folder", folder.display())
            }
            Self::Conf { file, .. } => {
                Verdict::new(Code::Unavailable, ErrorReason::NetworkNotReady)
                    .fact("folder", file.display())
            }
            Self::Argument {
                field,
                value,
                expected,
            } => Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                .fact("field", format!("config.{field}"))
                .fact("value", value)
                .fact("expected", expected),
            Self::PluginMissing {
                plugin, network, ..
            } => Verdict::new(Code::FailedPrecondition, ErrorReason::NetworkPlugin)
                .fact("plugin", plugin)
                .fact("network", network),
            Self::Plugin {
                plugin: name,
                network,
                verb,
                code,
                ..
            } => {
                // 11 and 50 are the specification's for "later".
                let status = match code {
                    11 | 50 => Code::Unavailable,
                    _ => Code::Internal,
                };
                plugin(status, name, network, verb).fact("code", code)
            }
            Self::Run {
                plugin: name,
                network,
                verb,
                ..
            }
            | Self::Silent {
                plugin: name,
                network,
                verb,
                ..
            }
            | Self::Answer {
                plugin: name,
                network,
                verb,
                ..
            } => plugin(Code::Internal, name, network, verb),
            Self::Deadline {
                plugin,
                network,
                verb,
                after,
            } => Verdict::new(Code::DeadlineExceeded, ErrorReason::Deadline)
                .fact("stage", format!("CNI {verb} {plugin} of network {network}"))
                .fact("stage_seconds", after.as_secs_f64()),
            Self::Cancelled { verb, .. } => {
                Verdict::new(Code::Aborted, ErrorReason::Preempted).fact("operation", verb)
            }
        }
    }
}

impl ToStatus for CgroupError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::NoHierarchy | Self::NoTracking => {
                Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                    .fact("feature", "cgroups")
            }
            Self::NoSystemd => Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                .fact("feature", "systemd as process 1"),
            Self::BadPath { path, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                    .fact("field", "config.linux.cgroup_parent")
                    .fact("value", path)
            }
            Self::BadResource { field, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField).fact("field", field)
            }
            Self::BelowUsage { limit, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::OutOfRange)
                    .fact("field", "memory_limit_in_bytes")
                    .fact("value", limit)
            }
            Self::ControllerMissing { controller, field } => {
                Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                    .fact("feature", format!("cgroup controller {controller}"))
                    .fact("field", field)
            }
            Self::SharedFreezer { .. } => {
                Verdict::new(Code::Unimplemented, ErrorReason::KernelLacks)
                    .fact("feature", "a freezer hierarchy of its own")
            }
            Self::Refused { value, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                    .fact("field", "linux.resources")
                    .fact("value", value)
            }
            Self::Call { call, source, .. } => system(call, source),
            Self::Systemd { unit, .. } | Self::NoScope { unit, .. } => {
                Verdict::new(Code::Unavailable, ErrorReason::System)
                    .fact("step", format!("start {unit}"))
            }
            Self::Absent { .. } | Self::StillBusy { .. } | Self::Malformed { .. } => {
                Verdict::new(Code::Internal, ErrorReason::System).fact("step", "cgroup")
            }
        }
    }
}

impl ToStatus for HandlerError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::ShimMissing { source, .. } => system("find the shim", source),
            Self::Spawn { step, source, .. } => system(step, source),
            Self::ShimLost { sandbox, .. }
            | Self::ShimSilent { sandbox, .. }
            | Self::ShimVersion { sandbox, .. } => {
                Verdict::new(Code::Unavailable, ErrorReason::ShimUnavailable).fact("id", sandbox)
            }
            Self::Impostor { uid, .. } => Verdict::new(Code::PermissionDenied, ErrorReason::Denied)
                .fact("action", format!("listen as uid {uid}")),
            Self::Step { step, errno, .. } => engine(step, *errno),
            Self::UnknownContainer { container, .. } => {
                Verdict::new(Code::NotFound, ErrorReason::ContainerNotFound).fact("id", container)
            }
            Self::Unsupported { feature } => {
                Verdict::new(Code::Unimplemented, ErrorReason::NotImplemented)
                    .fact("feature", feature)
            }
            Self::BadSpec { field, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField).fact("field", field)
            }
            Self::Seccomp { .. } => Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                .fact("field", "config.linux.security_context.seccomp"),
            Self::BadName { name, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::UnknownHandler)
                    .fact("handler", name)
            }
            Self::RuntimeMissing { handler, .. } | Self::UnknownHandler { handler, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::UnknownHandler)
                    .fact("handler", handler)
            }
            Self::Runtime { command, blame, .. } => {
                let (code, reason) = match blame {
                    Blame::CommandNotFound => (Code::NotFound, ErrorReason::CommandNotFound),
                    Blame::CommandNotExecutable => {
                        (Code::FailedPrecondition, ErrorReason::CommandNotExecutable)
                    }
                    Blame::Other => (Code::Internal, ErrorReason::System),
                };
                Verdict::new(code, reason)
                    .fact("step", command)
                    .fact("errno", 0)
            }
            Self::Cgroup(error) => error.verdict(),
        }
    }
}

/// A failed step of the engine: what the command itself is to blame for has reasons of its own.
fn engine(step: &str, errno: i32) -> Verdict {
    let executing = step.starts_with("execve");
    // Compared as a number: 0, where no system call is to blame, is no `Errno`.
    let is = |known: Errno| known.raw_os_error() == errno;
    let (code, reason) = if executing && is(Errno::NOENT) {
        (Code::NotFound, ErrorReason::CommandNotFound)
    } else if executing
        && [Errno::ACCESS, Errno::NOEXEC, Errno::ISDIR]
            .into_iter()
            .any(is)
    {
        (Code::FailedPrecondition, ErrorReason::CommandNotExecutable)
    } else {
        (Code::Internal, ErrorReason::System)
    };
    Verdict::new(code, reason)
        .fact("step", step)
        .fact("command", step.strip_prefix("execve ").unwrap_or_default())
        .fact("errno", errno)
}

impl ToStatus for RootfsError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Layer(error) => error.verdict(),
            Self::Kernel { call, source, .. } => system(call, &std::io::Error::from(*source)),
            Self::LayerLost { diff_id, .. } => {
                Verdict::new(Code::DataLoss, ErrorReason::ContentInvalid).fact("digest", diff_id)
            }
            Self::NotAFile { path }
            | Self::NotADirectory { path }
            | Self::FileTooLarge { path, .. }
            | Self::SymlinkLoop { path } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ContentInvalid)
                    .fact("path", path.display())
            }
            Self::Busy { container } => {
                Verdict::new(Code::Aborted, ErrorReason::OperationInProgress)
                    .fact("subject", container)
            }
            Self::Changing { path } => {
                Verdict::new(Code::Aborted, ErrorReason::OperationInProgress)
                    .fact("subject", path.display())
            }
        }
    }
}

impl ToStatus for LayerError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Source { .. } | Self::Truncated { .. } | Self::Header { .. } => {
                Verdict::new(Code::DataLoss, ErrorReason::ContentInvalid)
            }
            Self::Cancelled => Verdict::new(Code::Cancelled, ErrorReason::Cancelled),
            Self::Path { path, .. }
            | Self::Unsupported { path, .. }
            | Self::Whiteout { path }
            | Self::ParentNotDirectory { path }
            | Self::SymlinkLoop { path }
            | Self::LinkTarget { path, .. }
            | Self::Attribute { path, .. }
            | Self::Sparse { path } => Verdict::new(Code::DataLoss, ErrorReason::ContentInvalid)
                .fact("path", path.display()),
            Self::TooLarge { limit, .. } => {
                Verdict::new(Code::ResourceExhausted, ErrorReason::LayerTooLarge)
                    .fact("limit", limit)
            }
            Self::NoSpace { path } => Verdict::new(Code::ResourceExhausted, ErrorReason::DiskFull)
                .fact("path", path.display()),
            Self::Kernel { call, source, .. } => system(call, &std::io::Error::from(*source)),
        }
    }
}

impl ToStatus for ImageError {
    fn verdict(&self) -> Verdict {
        match self {
            Self::Reference(_) => Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                .fact("field", "image.image"),
            Self::Auth(_) => Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                .fact("field", "auth.auth"),
            Self::RegistryUnavailable { host, .. }
            | Self::Tls { endpoint: host, .. }
            | Self::RateLimited { host, .. }
            | Self::Stalled { host, .. }
            | Self::UnexpectedAnswer { host, .. } => {
                Verdict::new(Code::Unavailable, ErrorReason::RegistryUnavailable)
                    .fact("registry", host)
            }
            Self::Denied {
                reference, host, ..
            } => Verdict::new(Code::PermissionDenied, ErrorReason::RegistryDenied)
                .fact("registry", host)
                .fact("reference", reference),
            Self::NotFound { reference, host } => {
                Verdict::new(Code::NotFound, ErrorReason::ReferenceNotFound)
                    .fact("reference", reference)
                    .fact("registry", host)
            }
            Self::NoPlatform {
                reference, wanted, ..
            } => Verdict::new(Code::NotFound, ErrorReason::PlatformNotFound)
                .fact("reference", reference)
                .fact("platform", wanted),
            Self::Schema1 { reference } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("reference", reference)
            }
            Self::UnsupportedMediaType { media_type, .. }
            | Self::ForeignLayer { media_type, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("media_type", media_type)
            }
            Self::Malformed { .. } | Self::SizeMismatch { .. } | Self::LayerCount { .. } => {
                Verdict::new(Code::DataLoss, ErrorReason::ContentInvalid)
            }
            Self::TooLarge { limit_bytes, .. } => {
                Verdict::new(Code::ResourceExhausted, ErrorReason::LayerTooLarge)
                    .fact("limit", limit_bytes)
            }
            Self::DigestMismatch {
                expected, actual, ..
            } => Verdict::new(Code::DataLoss, ErrorReason::DigestMismatch)
                .fact("expected", expected)
                .fact("found", actual),
            Self::Layer { source, .. } | Self::Root { source } => source.verdict(),
            Self::RootPacking { packing } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("packing", packing)
            }
            Self::NoInit => Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                .fact("path", "/sbin/init"),
            Self::NotSystem { image, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("image", image)
            }
            Self::Export { source } => system("export image", source),
            Self::UnknownRemote { name, known } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::InvalidField)
                    .fact("field", "reference")
                    .fact("value", name)
                    .fact("expected", known.join(", "))
            }
            Self::RemoteConfig { remote, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("remote", remote)
            }
            Self::BadIndex { url, .. } => {
                Verdict::new(Code::DataLoss, ErrorReason::ContentInvalid).fact("url", url)
            }
            Self::Rootfs { source, .. } => source.verdict(),
            Self::Store(error) => error.verdict(),
            Self::Content { action, source, .. } => system(action, source),
            Self::Ambiguous { prefix, .. } => {
                Verdict::new(Code::InvalidArgument, ErrorReason::AmbiguousId)
                    .fact("kind", "image")
                    .fact("id", prefix)
            }
            Self::Unknown { name } => {
                Verdict::new(Code::NotFound, ErrorReason::ImageNotFound).fact("image", name)
            }
            Self::InUse { image, holder } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageInUse)
                    .fact("image", image)
                    .fact("holder", holder)
            }
            Self::Config { host, .. } => {
                Verdict::new(Code::FailedPrecondition, ErrorReason::ImageRefused)
                    .fact("registry", host)
            }
            Self::Cancelled => Verdict::new(Code::Cancelled, ErrorReason::Cancelled),
        }
    }
}

/// What the kernel or a disk refused.
fn system(step: &str, source: &std::io::Error) -> Verdict {
    let verdict = match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Verdict::new(Code::ResourceExhausted, ErrorReason::DiskFull)
        }
        _ => Verdict::new(Code::Internal, ErrorReason::System),
    };
    verdict
        .fact("step", step)
        .fact("errno", source.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_steps_of_the_engine_have_codes() {
        for (step, errno, code) in [
            ("execve /x", 2, Code::NotFound),
            ("execve /x", 13, Code::FailedPrecondition),
            ("execve /x", 5, Code::Internal),
            ("chdir /x", 2, Code::Internal),
            ("container's first process was killed", 0, Code::Internal),
            ("from another version", -7, Code::Internal),
        ] {
            assert_eq!(engine(step, errno).code, code, "{step} {errno}");
        }
    }
}
