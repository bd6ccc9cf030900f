//! The node itself: `info`, `df`, `check`, `fsck`.

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;
use longshore_client::{
    Error, idempotency_key,
    proto::{
        CgroupVersion, CheckRequest, Counts, Difference, DifferenceKind, FsckRequest, InfoRequest,
        InfoResponse, Severity, UsageRequest,
    },
};

use crate::{
    app::App,
    exit_code::ExitCode,
    find::Things,
    human,
    output::{Cell, Column, Table, Tone, json, row},
};

#[derive(Debug, Args)]
pub(crate) struct Info {}

impl Info {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let rows = app
            .ask(|client| async move {
                client
                    .repeat(InfoRequest {}, |client, request| async move {
                        client.node().info(request).await
                    })
                    .await
            })
            .await?;
        match rows.as_slice() {
            [(_, info)] if !app.many() && app.output.for_programs() => {
                app.output.data(&json(info)?)?;
            }
            [(_, info)] if !app.many() => {
                for (name, value) in facts(info, Timestamp::now()) {
                    app.output.line(&format!("{name:<14} {value}"))?;
                }
            }
            rows if app.output.for_programs() => app
                .output
                .list(rows.iter().map(|(node, info)| (Some(node.as_str()), info)))?,
            rows => app.output.table(&table(rows))?,
        }
        Ok(app.outcome())
    }
}

fn facts(info: &InfoResponse, now: Timestamp) -> Vec<(&'static str, String)> {
    let counts = info.counts.unwrap_or_default();
    let handlers: Vec<&str> = info
        .handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    vec![
        ("Version", info.version.clone()),
        ("Instance", info.instance_id.clone()),
        ("Host", info.hostname.clone()),
        (
            "System",
            format!("{}, Linux {}", info.os_name, info.kernel_release),
        ),
        ("Architecture", info.architecture.clone()),
        ("CPUs", info.cpus.to_string()),
        ("Memory", human::bytes(info.memory_bytes)),
        ("Cgroups", cgroups(info).to_owned()),
        ("Handlers", handlers.join(", ")),
        ("Data", info.data_dir.clone()),
        ("Run", info.run_dir.clone()),
        ("Up since", human::since(info.started_at, now)),
        (
            "Pods",
            of_which(counts.sandboxes, counts.ready_sandboxes, "ready"),
        ),
        (
            "Containers",
            of_which(counts.containers, counts.running_containers, "running"),
        ),
        (
            "Images",
            format!("{} with {} layers", counts.images, counts.layers),
        ),
        ("Networks", counts.networks.to_string()),
        ("Operations", counts.operations.to_string()),
    ]
}

fn of_which(all: u32, some: u32, what: &str) -> String {
    format!("{all}, {some} {what}")
}

fn cgroups(info: &InfoResponse) -> &'static str {
    match info.cgroup_version() {
        CgroupVersion::V1 => "v1",
        CgroupVersion::V2 => "v2",
        CgroupVersion::Unspecified => "unknown",
    }
}

fn table(rows: &[(String, InfoResponse)]) -> Table {
    let mut table = Table::new(&[
        Column::text("NODE"),
        Column::text("VERSION"),
        Column::text("HOST"),
        Column::text("KERNEL"),
        Column::text("CGROUPS"),
        Column::number("CPUS"),
        Column::number("MEMORY"),
        Column::number("PODS"),
        Column::number("CONTAINERS"),
        Column::number("IMAGES"),
        Column::wide("INSTANCE"),
        Column::wide("SYSTEM"),
    ]);
    for (node, info) in rows {
        let counts: Counts = info.counts.unwrap_or_default();
        table.push(row![
            node.as_str(),
            info.version.as_str(),
            info.hostname.as_str(),
            info.kernel_release.as_str(),
            cgroups(info),
            info.cpus.to_string(),
            human::bytes(info.memory_bytes),
            format!("{}/{}", counts.ready_sandboxes, counts.sandboxes),
            format!("{}/{}", counts.running_containers, counts.containers),
            counts.images.to_string(),
            info.instance_id.as_str(),
            info.os_name.as_str(),
        ]);
    }
    table
}

#[derive(Debug, Args)]
pub(crate) struct Df {
    /// Also each container, which walks its files
    #[arg(short, long)]
    verbose: bool,
}

impl Df {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let request = UsageRequest {
            containers: self.verbose,
        };
        let usage = client
            .repeat(request, |client, request| async move {
                client.node().usage(request).await
            })
            .await?;
        if app.output.for_programs() {
            app.output.data(&json(&usage)?)?;
            return Ok(ExitCode::OK);
        }
        let mut table = Table::new(&[
            Column::text("WHAT"),
            Column::number("USED"),
            Column::number("INODES"),
            Column::number("AVAILABLE"),
            Column::text("WHERE"),
        ]);
        let filesystems = [("images", &usage.images), ("containers", &usage.containers)];
        for (what, filesystem) in filesystems {
            let filesystem = filesystem.clone().unwrap_or_default();
            table.push(row![
                what,
                human::bytes(filesystem.used_bytes),
                filesystem.used_inodes.to_string(),
                human::bytes(filesystem.available_bytes),
                filesystem.mountpoint,
            ]);
        }
        if self.verbose {
            let things = Things::read(&client).await?;
            for one in &usage.by_container {
                let named = things
                    .containers
                    .iter()
                    .find(|known| known.id == one.container_id);
                table.push(row![
                    human::short_id(&one.container_id),
                    human::bytes(one.used_bytes),
                    one.used_inodes.to_string(),
                    "",
                    named
                        .map(|container| things.full_name(container))
                        .unwrap_or_default(),
                ]);
            }
        }
        app.output.table(&table)?;
        Ok(ExitCode::OK)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Check {}

impl Check {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let answer = client
            .repeat(CheckRequest {}, |client, request| async move {
                client.node().check(request).await
            })
            .await?;
        let bad = answer
            .findings
            .iter()
            .any(|finding| finding.severity() == Severity::Error);
        if app.output.for_programs() {
            app.output.data(&json(&answer)?)?;
        } else if answer.findings.is_empty() {
            app.output.line("nothing is amiss")?;
        } else {
            let mut table = Table::new(&[
                Column::text("SEVERITY"),
                Column::text("SUBJECT"),
                Column::text("WHAT IS SO"),
                Column::text("WHAT TO DO"),
            ]);
            for finding in &answer.findings {
                let severity = match finding.severity() {
                    Severity::Error => Cell::toned("error", Tone::Bad),
                    Severity::Warning => Cell::toned("warning", Tone::Warn),
                    Severity::Info | Severity::Unspecified => Cell::toned("info", Tone::Dim),
                };
                table.push(row![
                    severity,
                    finding.subject.as_str(),
                    finding.explanation.as_str(),
                    finding.remedy.as_str(),
                ]);
            }
            app.output.table(&table)?;
        }
        Ok(if bad { ExitCode::FAILURE } else { ExitCode::OK })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Fsck {
    /// Repair what can be repaired
    #[arg(long, visible_alias = "fix")]
    repair: bool,
}

impl Fsck {
    /// Ends well if there is no difference, or none is left.
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let request = FsckRequest {
            idempotency_key: if self.repair {
                idempotency_key()
            } else {
                String::new()
            },
            repair: self.repair,
        };
        let mut node = client.node();
        let mut stream = client.call(node.fsck(request)).await?;
        let (mut found, mut left) = (0, 0);
        while let Some(answer) = stream
            .message()
            .await
            .map_err(|status| Error::from_status(client.address(), status))?
        {
            let Some(difference) = answer.difference else {
                continue;
            };
            found += 1;
            left += usize::from(!difference.repaired);
            if app.output.for_programs() {
                app.output.item(&json(&difference)?)?;
            } else {
                app.output.line(&line(&difference))?;
            }
        }
        if !app.output.for_programs() {
            app.output.line(&match (found, left) {
                (0, _) => "no difference".to_owned(),
                (found, 0) => format!("{found} differences, all repaired"),
                (found, left) if self.repair => format!("{found} differences, {left} left"),
                (found, _) => format!("{found} differences; --repair repairs what can be"),
            })?;
        }
        Ok(if left == 0 {
            ExitCode::OK
        } else {
            ExitCode::FAILURE
        })
    }
}

fn line(difference: &Difference) -> String {
    let kind = match difference.kind() {
        DifferenceKind::Leftover => "left over",
        DifferenceKind::Missing => "missing",
        DifferenceKind::Changed => "changed",
        DifferenceKind::Unspecified => "different",
    };
    let done = match (
        difference.repaired,
        difference.error.as_str(),
        difference.repair.as_str(),
    ) {
        (true, ..) => "repaired".to_owned(),
        (false, "", "") => "needs a person".to_owned(),
        (false, "", repair) => format!("repair: {repair}"),
        (false, error, _) => format!("repair failed: {error}"),
    };
    format!(
        "{kind}: {} {}: {}; {done}",
        difference.subject_type, difference.subject, difference.cause
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_says_what_why_and_what_then() {
        let mut difference = Difference {
            kind: DifferenceKind::Leftover.into(),
            subject_type: "link".into(),
            subject: "veth1".into(),
            cause: "no sandbox has it".into(),
            repair: "delete the link".into(),
            ..Default::default()
        };
        assert_eq!(
            line(&difference),
            "left over: link veth1: no sandbox has it; repair: delete the link"
        );
        difference.error = "busy".into();
        assert!(line(&difference).ends_with("repair failed: busy"));
        difference.repaired = true;
        assert!(line(&difference).ends_with("; repaired"));
    }
}
