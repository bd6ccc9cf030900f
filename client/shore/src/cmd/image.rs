//! Images: pull, list, name, remove.

use std::io::{self, BufRead as _, Write as _};

use anyhow::{Context as _, Result};
use clap::{ArgGroup, Args};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    Client, idempotency_key,
    proto::{
        self, BasicAuth, ListImagesRequest, Platform, PruneImagesRequest, PruneReason,
        PullImageRequest, RegistryAuth, RemoveImageRequest, TagImageRequest,
        registry_auth::Credential,
    },
};

use super::each;
use crate::{
    app::App,
    complete::{Every, Live},
    error::Problem,
    exit_code::ExitCode,
    human,
    output::{Cell, Column, Table, Tone, json, row},
    parse,
    progress::{self, Show},
    terminal,
};

/// How to log in to a registry.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("password").args(["password_stdin", "password_file"]))]
pub(crate) struct Login {
    /// User at the registry; the password comes from --password-stdin or --password-file
    #[arg(long, value_name = "USER", requires = "password")]
    username: Option<String>,
    /// Read the password from standard input
    #[arg(long, requires = "username")]
    password_stdin: bool,
    /// Read the password from a file
    #[arg(long, value_name = "FILE", requires = "username")]
    password_file: Option<std::path::PathBuf>,
}

impl Login {
    /// The credentials; a password on the command line would be everybody's to read.
    fn auth(&self) -> Result<Option<RegistryAuth>> {
        let Some(username) = self.username.clone() else {
            return Ok(None);
        };
        let mut password = match &self.password_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("reading the password from {}", path.display()))?,
            None => {
                let mut line = String::new();
                io::stdin()
                    .lock()
                    .read_line(&mut line)
                    .context("reading the password")?;
                line
            }
        };
        password.truncate(password.trim_end_matches(['\n', '\r']).len());
        let basic = BasicAuth { username, password };
        Ok(Some(RegistryAuth {
            credential: Some(Credential::Basic(basic)),
        }))
    }
}

/// `OS/ARCHITECTURE[/VARIANT]`.
fn platform(text: &str) -> Result<Platform, String> {
    let mut parts = text.split('/').map(str::to_owned);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(os), Some(architecture), variant, None)
            if !os.is_empty() && !architecture.is_empty() =>
        {
            Ok(Platform {
                os,
                architecture,
                variant: variant.unwrap_or_default(),
            })
        }
        _ => Err("write OS/ARCHITECTURE, as in linux/arm64".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// What to pull, as in busybox, ghcr.io/me/app:1.2 or NAME@sha256:…
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(Every(Live::Images)))]
    images: Vec<String>,
    /// Pull for another platform, as in linux/arm64
    #[arg(long, value_parser = platform)]
    platform: Option<Platform>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    login: Login,
}

impl Pull {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let auth = self.login.auth()?;
        let show = Show::fitting(self.quiet);
        for image in &self.images {
            let request = PullImageRequest {
                idempotency_key: String::new(),
                reference: image.clone(),
                auth: auth.clone(),
                platform: self.platform.clone(),
            };
            let pulled = progress::pull(&client, request, show)
                .await
                .with_context(|| format!("pulling {image}"))?;
            if app.output.for_programs() {
                app.output.data(&json(&pulled)?)?;
            } else {
                app.output.line(&pulled.image_id)?;
            }
        }
        Ok(ExitCode::OK)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Only the image with this name or id
    #[arg(value_name = "IMAGE", add = ArgValueCompleter::new(Every(Live::Images)))]
    image: Option<String>,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// Only images with this label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::pair)]
    labels: Vec<parse::Pair>,
}

impl Images {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let request = ListImagesRequest {
            image: self.image.clone().unwrap_or_default(),
            label_selector: super::container::labels(&self.labels),
            ..Default::default()
        };
        let rows = app
            .ask(|client| {
                let request = request.clone();
                async move { client.all_images(request).await }
            })
            .await?;
        let images = || {
            rows.iter()
                .flat_map(|(node, images)| images.iter().map(move |image| (node.as_str(), image)))
        };
        if self.quiet {
            for (_, image) in images() {
                app.output.line(&image.id)?;
            }
        } else if app.output.for_programs() {
            app.output
                .list(images().map(|(node, image)| (app.many().then_some(node), image)))?;
        } else {
            let mut table = Table::new(&[
                Column::text("REPOSITORY"),
                Column::text("TAG"),
                Column::text("IMAGE ID"),
                Column::number("SIZE"),
                Column::text("PULLED"),
                Column::wide("BUILT"),
                Column::wide("PLATFORM"),
                Column::wide("DIGEST"),
            ])
            .first(app.node_column());
            let now = Timestamp::now();
            for (node, image) in images() {
                for (repository, tag) in names(image) {
                    let mut row = image_row(image, &repository, &tag, now, app.output.wide());
                    app.name_row(&mut row, node);
                    table.push(row);
                }
            }
            app.output.table(&table)?;
        }
        Ok(app.outcome())
    }
}

/// Repository and tag of each name; an image without tags has one row all the same.
fn names(image: &proto::Image) -> Vec<(String, String)> {
    if image.tags.is_empty() {
        let repository = image
            .digests
            .first()
            .and_then(|name| name.split_once('@'))
            .map_or("<none>", |(repository, _)| human::familiar(repository));
        return vec![(repository.to_owned(), "<none>".to_owned())];
    }
    image
        .tags
        .iter()
        .map(|tag| match tag.rsplit_once(':') {
            Some((repository, tag)) => (human::familiar(repository).to_owned(), tag.to_owned()),
            None => (human::familiar(tag).to_owned(), "<none>".to_owned()),
        })
        .collect()
}

fn image_row(
    image: &proto::Image,
    repository: &str,
    tag: &str,
    now: Timestamp,
    wide: bool,
) -> Vec<Cell> {
    let tone = if tag == "<none>" {
        Tone::Dim
    } else {
        Tone::Plain
    };
    let platform = image.platform.clone().unwrap_or_default();
    let id = if wide {
        image.id.as_str()
    } else {
        human::short_id(&image.id)
    };
    let digest = image
        .digests
        .first()
        .and_then(|name| name.split_once('@'))
        .map_or("-", |(_, digest)| digest);
    row![
        repository,
        Cell::toned(tag, tone),
        id,
        human::bytes(image.size_bytes),
        human::since(image.pulled_at, now),
        human::since(image.built_at, now),
        format!("{}/{}", platform.os, platform.architecture),
        digest,
    ]
}

#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// The image, by name or id
    #[arg(value_name = "IMAGE", add = ArgValueCompleter::new(Every(Live::Images)))]
    image: String,
    /// Its new name, as in example.org/app:v2
    #[arg(value_name = "NEW_NAME")]
    tag: String,
}

impl Tag {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let request = TagImageRequest {
            idempotency_key: idempotency_key(),
            image: self.image,
            tag: self.tag,
        };
        let tagged = client
            .repeat(request, |client, request| async move {
                client.images().tag_image(request).await
            })
            .await?;
        if let (true, Some(image)) = (app.output.for_programs(), &tagged.image) {
            app.output.data(&json(image)?)?;
        }
        Ok(ExitCode::OK)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Rmi {
    /// Images, by name (which is taken away) or id (which takes all names and the image)
    #[arg(required = true, value_name = "IMAGE", add = ArgValueCompleter::new(Every(Live::Images)))]
    images: Vec<String>,
}

impl Rmi {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let client = &client;
        each(app, &self.images, |image| async move {
            remove(client, image).await
        })
        .await
    }
}

async fn remove(client: &Client, image: &str) -> Result<String> {
    let request = RemoveImageRequest {
        idempotency_key: idempotency_key(),
        image: image.to_owned(),
    };
    let removed = client
        .repeat(request, |client, request| async move {
            client.images().remove_image(request).await
        })
        .await
        .with_context(|| format!("removing {image}"))?;
    let mut lines: Vec<String> = removed
        .removed_references
        .iter()
        .map(|name| format!("untagged {name}"))
        .collect();
    if !removed.removed_image_id.is_empty() {
        lines.push(format!("removed {}", removed.removed_image_id));
    }
    if lines.is_empty() {
        // The agent calls this success, so that a repetition is one; a person may have mistyped.
        return Err(Problem::NotFound {
            kind: "image",
            name: image.to_owned(),
        }
        .into());
    }
    Ok(lines.join("\n"))
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Only tell what would go, and why what stays stays
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Don't ask
    #[arg(short, long)]
    force: bool,
}

impl Prune {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        if self.dry_run {
            return self.show(app, &prune(&client, true).await?);
        }
        if !self.force {
            if !terminal::interactive() {
                return Err(Problem::Usage(
                    "nobody is here to ask: add --force to remove, or --dry-run to look".into(),
                )
                .into());
            }
            let plan = prune(&client, true).await?;
            let count = plan.decisions.iter().filter(|one| one.removed).count();
            if !confirmed(&format!(
                "Remove {count} images ({})?",
                human::bytes(plan.reclaimed_bytes)
            ))? {
                return Ok(ExitCode::FAILURE);
            }
        }
        self.show(app, &prune(&client, false).await?)
    }

    fn show(&self, app: &App, answer: &proto::PruneImagesResponse) -> Result<ExitCode> {
        if app.output.for_programs() {
            app.output.data(&json(answer)?)?;
            return Ok(ExitCode::OK);
        }
        let mut table = Table::new(&[
            Column::text("IMAGE ID"),
            Column::text("NAME"),
            Column::number("SIZE"),
            Column::text("WHAT"),
            Column::text("WHY"),
        ]);
        for one in &answer.decisions {
            let what = match (one.removed, self.dry_run) {
                (true, true) => Cell::toned("would go", Tone::Warn),
                (true, false) => Cell::toned("removed", Tone::Warn),
                (false, _) => Cell::toned("stays", Tone::Good),
            };
            table.push(row![
                human::short_id(&one.image_id),
                one.references
                    .first()
                    .map_or("<none>", |name| human::familiar(name)),
                human::bytes(one.size_bytes),
                what,
                why(one),
            ]);
        }
        app.output.table(&table)?;
        let verb = if self.dry_run { "Would free" } else { "Freed" };
        app.output
            .line(&format!("{verb} {}", human::bytes(answer.reclaimed_bytes)))?;
        Ok(ExitCode::OK)
    }
}

fn why(decision: &proto::PruneDecision) -> String {
    let why = match decision.reason() {
        PruneReason::Unspecified => "",
        PruneReason::Unused => "no container uses it",
        PruneReason::Untagged => "it has no tag, and no container uses it",
        PruneReason::InUse => "in use",
        PruneReason::Pinned => "pinned",
        PruneReason::OtherFace => "Kubernetes uses it",
        PruneReason::Busy => "a running pull or create needs it",
    };
    if decision.holder.is_empty() {
        why.to_owned()
    } else {
        format!("{why} by {}", decision.holder)
    }
}

async fn prune(client: &Client, dry_run: bool) -> Result<proto::PruneImagesResponse> {
    let request = PruneImagesRequest {
        idempotency_key: if dry_run {
            String::new()
        } else {
            idempotency_key()
        },
        dry_run,
    };
    Ok(client
        .repeat(request, |client, request| async move {
            client.images().prune_images(request).await
        })
        .await?)
}

fn confirmed(question: &str) -> Result<bool> {
    let mut out = io::stderr().lock();
    write!(out, "{question} [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_have_two_or_three_parts() {
        let parsed = platform("linux/arm64/v8").expect("valid");
        assert_eq!(
            (
                parsed.os.as_str(),
                parsed.architecture.as_str(),
                parsed.variant.as_str()
            ),
            ("linux", "arm64", "v8")
        );
        assert!(platform("linux/amd64").is_ok());
        for bad in ["linux", "/amd64", "linux/", "a/b/c/d", ""] {
            assert!(platform(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_image_has_a_row_per_name_and_one_without() {
        let mut image = proto::Image {
            tags: vec![
                "docker.io/library/busybox:1.36".into(),
                "localhost:5000/b:2".into(),
            ],
            digests: vec!["docker.io/library/busybox@sha256:0a".into()],
            ..Default::default()
        };
        assert_eq!(
            names(&image),
            [
                ("busybox".to_owned(), "1.36".to_owned()),
                ("localhost:5000/b".to_owned(), "2".to_owned())
            ]
        );
        image.tags.clear();
        assert_eq!(names(&image), [("busybox".to_owned(), "<none>".to_owned())]);
    }
}
