//! Images: pull, list, name, remove.

use std::io::{self, BufRead as _, Write as _};

use anyhow::{Context as _, Result};
use clap::{ArgGroup, Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use jiff::Timestamp;
use longshore_client::{
    Client, Error, idempotency_key,
    proto::{
        self, BasicAuth, ExportImageRequest, ExportPacking, ImportImageRequest, ImportTarget,
        ListImagesRequest, ListRemoteImagesRequest, Platform, PruneImagesRequest, PruneReason,
        PullImageRequest, RegistryAuth, RemoveImageRequest, TagImageRequest, import_image_request,
        registry_auth::Credential,
    },
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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
    /// What to pull, as in busybox, ghcr.io/me/app:1.2, NAME@sha256:… or, from a remote,
    /// images:debian/bookworm
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
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Images {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    list: List,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List what the remotes offer: distributions' images, for system containers
    RemoteList(RemoteList),
    /// Make an image of files: a unified image, metadata and root tree, or a root tree alone
    Import(Import),
    /// Write a distribution's image to a file, as a unified image
    Export(Export),
}

impl Images {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        match self.verb {
            None => self.list.run(app).await,
            Some(Verb::RemoteList(list)) => list.run(app).await,
            Some(Verb::Import(import)) => import.run(app).await,
            Some(Verb::Export(export)) => export.run(app).await,
        }
    }
}

#[derive(Debug, Args)]
struct Export {
    /// The image, by name or id
    #[arg(value_name = "IMAGE", add = ArgValueCompleter::new(Every(Live::Images)))]
    image: String,
    /// Where to, as in debian.tar.zst; the name's end says how it is packed: .tar, .tar.gz or .tar.zst
    #[arg(value_name = "FILE", value_parser = exported)]
    file: Exported,
}

/// A file to export to.
#[derive(Debug, Clone)]
struct Exported {
    path: std::path::PathBuf,
    packing: ExportPacking,
}

fn exported(text: &str) -> Result<Exported, String> {
    let packings = [
        (".tar", ExportPacking::None),
        (".tar.gz", ExportPacking::Gzip),
        (".tgz", ExportPacking::Gzip),
        (".tar.zst", ExportPacking::Zstd),
    ];
    let found = packings.into_iter().find(|(end, _)| text.ends_with(end));
    let (_, packing) = found.ok_or("end the name in .tar, .tar.gz or .tar.zst")?;
    Ok(Exported {
        path: text.into(),
        packing,
    })
}

impl Export {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let request = ExportImageRequest {
            image: self.image.clone(),
            packing: self.file.packing.into(),
        };
        let failed = |status| Error::from_status(client.address(), status);
        let mut chunks = client
            .images()
            .export_image(request)
            .await
            .map_err(failed)?
            .into_inner();
        // Half of a file never has the name of a whole one.
        let path = &self.file.path;
        let mut unfinished = path.clone().into_os_string();
        unfinished.push(".unfinished");
        let unfinished = std::path::PathBuf::from(unfinished);
        let write = async {
            let mut file = tokio::fs::File::create(&unfinished)
                .await
                .with_context(|| format!("creating {}", unfinished.display()))?;
            let mut length = 0;
            while let Some(message) = chunks.message().await.map_err(failed)? {
                file.write_all(&message.chunk).await?;
                length += message.chunk.len() as u64;
            }
            file.flush().await?;
            tokio::fs::rename(&unfinished, path).await?;
            anyhow::Ok(length)
        };
        let written = write
            .await
            .with_context(|| format!("writing {}", path.display()));
        if written.is_err() {
            let _ = std::fs::remove_file(&unfinished);
        }
        let length = written?;
        app.output
            .line(&format!("{} ({})", path.display(), human::bytes(length)))?;
        Ok(ExitCode::OK)
    }
}

/// Tars, as they are or as gzip, xz, lzma or zstd
#[derive(Debug, Args)]
struct Import {
    /// A unified image or a root tree; or metadata, and then the root tree
    #[arg(required = true, num_args = 1..=2, value_name = "FILE")]
    files: Vec<std::path::PathBuf>,
    /// The image's name, as in local/debian:12
    #[arg(short, long, value_name = "NAME")]
    tag: Option<String>,
    /// What a root tree alone is for, as in linux/arm64
    #[arg(long, value_parser = platform)]
    platform: Option<Platform>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// What one message of an import carries.
const IMPORT_CHUNK_BYTES: usize = 256 << 10;

impl Import {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let mut files = Vec::new();
        for path in &self.files {
            let open = async {
                let file = tokio::fs::File::open(path).await?;
                let metadata = file.metadata().await?;
                if !metadata.is_file() {
                    return Err(io::Error::other("is not a regular file"));
                }
                Ok((file, metadata.len()))
            };
            let opened = open.await;
            files.push(opened.with_context(|| format!("reading {}", path.display()))?);
        }
        let target = ImportTarget {
            tag: self.tag.unwrap_or_default(),
            file_sizes: files.iter().map(|(_, size)| *size).collect(),
            platform: self.platform,
        };
        let bar = progress::sending(target.file_sizes.iter().sum(), Show::fitting(self.quiet));
        let (messages, sent) = tokio::sync::mpsc::channel(4);
        let send = async {
            let part = |part| ImportImageRequest { part: Some(part) };
            // A send fails when the agent has answered, which says why.
            if messages
                .send(part(import_image_request::Part::Target(target)))
                .await
                .is_err()
            {
                return Ok(());
            }
            for (file, size) in &mut files {
                let mut file = file.take(*size);
                loop {
                    let mut chunk = Vec::with_capacity(IMPORT_CHUNK_BYTES);
                    let mut limited = (&mut file).take(IMPORT_CHUNK_BYTES as u64);
                    let length = limited.read_to_end(&mut chunk).await?;
                    if length == 0 {
                        break;
                    }
                    bar.inc(length as u64);
                    let chunk = import_image_request::Part::Chunk(chunk.into());
                    if messages.send(part(chunk)).await.is_err() {
                        return Ok(());
                    }
                }
            }
            drop(messages);
            Ok::<_, io::Error>(())
        };
        let mut images = client.images();
        let import = images.import_image(tokio_stream::wrappers::ReceiverStream::new(sent));
        let (sent, imported) = tokio::join!(send, import);
        bar.finish_and_clear();
        let names: Vec<_> = self
            .files
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        sent.with_context(|| format!("reading {}", names.join(" and ")))?;
        let imported = imported
            .map_err(|status| Error::from_status(client.address(), status))
            .with_context(|| format!("importing {}", names.join(" and ")))?
            .into_inner();
        let image = imported.image.unwrap_or_default();
        if app.output.for_programs() {
            app.output.data(&json(&image)?)?;
        } else {
            app.output.line(&image.id)?;
        }
        Ok(ExitCode::OK)
    }
}

#[derive(Debug, Args)]
struct RemoteList {
    /// Only of this remote
    #[arg(value_name = "REMOTE")]
    remote: Option<String>,
    /// Only this distribution, as in debian
    #[arg(short, long, value_name = "DIST")]
    dist: Option<String>,
    /// Only this release, by name or title, as in bookworm or 12
    #[arg(short, long)]
    release: Option<String>,
    /// Only this architecture, as in amd64
    #[arg(short, long)]
    arch: Option<String>,
    /// Only this variant, as in default or cloud
    #[arg(long)]
    variant: Option<String>,
}

impl RemoteList {
    async fn run(self, app: &App) -> Result<ExitCode> {
        let request = ListRemoteImagesRequest {
            remote: self.remote.unwrap_or_default(),
            os: self.dist.unwrap_or_default(),
            release: self.release.unwrap_or_default(),
            architecture: self.arch.unwrap_or_default(),
            variant: self.variant.unwrap_or_default(),
            ..Default::default()
        };
        let rows = app
            .ask(|client| {
                let request = request.clone();
                async move { client.all_remote_images(request).await }
            })
            .await?;
        let images = || {
            rows.iter()
                .flat_map(|(node, images)| images.iter().map(move |image| (node.as_str(), image)))
        };
        if app.output.for_programs() {
            app.output
                .list(images().map(|(node, image)| (app.many().then_some(node), image)))?;
            return Ok(app.outcome());
        }
        if images().next().is_none() && !app.many() {
            terminal::note(
                "nothing is offered; remotes are named in [image.remotes] of the agent's configuration",
            );
        }
        let mut table = Table::new(&[
            Column::text("DIST"),
            Column::text("RELEASE"),
            Column::text("ARCH"),
            Column::text("VARIANT"),
            Column::text("BUILD"),
            Column::number("SIZE"),
            Column::text("REFERENCE"),
            Column::wide("FINGERPRINT"),
        ])
        .first(app.node_column());
        for (node, image) in images() {
            let mut row = remote_row(image);
            app.name_row(&mut row, node);
            table.push(row);
        }
        app.output.table(&table)?;
        Ok(app.outcome())
    }
}

fn remote_row(image: &proto::RemoteImage) -> Vec<Cell> {
    let or_dash = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
    let size = match image.size_bytes {
        0 => "-".to_owned(),
        bytes => human::bytes(bytes),
    };
    let reference = if image.unreadable.is_empty() {
        Cell::from(or_dash(&image.reference))
    } else {
        Cell::toned(format!("only {}", image.unreadable.join(", ")), Tone::Dim)
    };
    row![
        &image.os,
        &image.release,
        &image.architecture,
        &image.variant,
        &image.serial,
        size,
        reference,
        or_dash(&image.fingerprint),
    ]
}

#[derive(Debug, Args)]
struct List {
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

impl List {
    async fn run(self, app: &App) -> Result<ExitCode> {
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
    fn the_end_of_a_name_says_how_an_export_is_packed() {
        for (name, packing) in [
            ("a.tar", ExportPacking::None),
            ("x/a.tar.gz", ExportPacking::Gzip),
            ("a.tgz", ExportPacking::Gzip),
            ("a.tar.zst", ExportPacking::Zstd),
        ] {
            assert_eq!(exported(name).expect("valid").packing, packing, "{name}");
        }
        assert!(exported("a.tar.xz").is_err());
    }

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
