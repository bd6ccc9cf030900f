//! ListRemoteImages: what the remotes offer, one row for the newest build of each product.

use super::Images;
use super::error::ImageError;
use super::manifest::Platform;
use super::source::remotes::Remote;
use super::system::catalog::{Content, Product, platform_of};
use super::system::reference::RemoteRef;
use crate::id::Digest;

/// Which rows are wanted; what is not set takes all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoteFilter {
    /// Name of a remote.
    pub remote: Option<String>,
    /// Distribution.
    pub os: Option<String>,
    /// Its release, by name or by title (`bookworm` or `12`).
    pub release: Option<String>,
    /// Processor, by any of its names.
    pub architecture: Option<String>,
    /// e.g. `default` or `cloud`.
    pub variant: Option<String>,
}

/// What a remote offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteImage {
    /// Name of the remote.
    pub remote: String,
    /// What pulls it; `None` if no reference can be written for it.
    pub reference: Option<RemoteRef>,
    /// Distribution.
    pub os: String,
    /// Name of the release.
    pub release: String,
    /// Its title, often a number.
    pub release_title: String,
    /// Processor, as the remote spells it.
    pub architecture: String,
    /// e.g. `default` or `cloud`.
    pub variant: String,
    /// When it was built.
    pub serial: String,
    /// Digest of its files together, if the remote tells it.
    pub fingerprint: Option<Digest>,
    /// What a pull fetches; 0 if the remote does not tell.
    pub size_bytes: u64,
    /// The forms that it comes in, if this agent reads none of them.
    pub unreadable: Vec<String>,
    /// Other names for it.
    pub aliases: Vec<String>,
}

impl Images {
    /// Asks remotes what they offer.
    ///
    /// # Errors
    /// `UnknownRemote`, and what went wrong at the first remote that did not answer well.
    pub async fn list_remote(&self, filter: &RemoteFilter) -> Result<Vec<RemoteImage>, ImageError> {
        let remotes = match &filter.remote {
            Some(name) => vec![self.inner.remotes.get(name)?],
            None => self.inner.remotes.all().collect(),
        };
        let asked = remotes.iter().map(|remote| remote.catalog());
        let catalogs = futures_util::future::try_join_all(asked).await?;
        let mut rows = Vec::new();
        for (remote, catalog) in remotes.iter().zip(catalogs) {
            let wanted = catalog
                .products
                .iter()
                .filter(|product| filter.takes(product));
            rows.extend(wanted.filter_map(|product| row(remote, product)));
        }
        Ok(rows)
    }
}

impl RemoteFilter {
    fn takes(&self, product: &Product) -> bool {
        let same = |wanted: &Option<String>, texts: &[&str]| {
            wanted
                .as_ref()
                .is_none_or(|wanted| texts.iter().any(|text| text.eq_ignore_ascii_case(wanted)))
        };
        let same_processor = match &self.architecture {
            None => true,
            Some(wanted) if *wanted == product.architecture => true,
            Some(wanted) => platform_of(wanted).is_some_and(|it| product.platform() == Some(it)),
        };
        same_processor
            && same(&self.os, &[&product.os])
            && same(&self.release, &[&product.release, &product.release_title])
            && same(&self.variant, &[&product.variant])
    }
}

fn row(remote: &Remote, product: &Product) -> Option<RemoteImage> {
    let newest = product.versions.first()?;
    Some(RemoteImage {
        remote: remote.name.clone(),
        reference: reference(&remote.name, product),
        os: product.os.clone(),
        release: product.release.clone(),
        release_title: product.release_title.clone(),
        architecture: product.architecture.clone(),
        variant: product.variant.clone(),
        serial: newest.serial.clone(),
        fingerprint: newest.fingerprint().cloned(),
        size_bytes: newest.size_bytes(),
        unreadable: match &newest.content {
            Content::Foreign(kinds) => kinds.clone(),
            _ => Vec::new(),
        },
        aliases: product.aliases.clone(),
    })
}

/// The shortest reference that means this product on this machine.
fn reference(remote: &str, product: &Product) -> Option<RemoteRef> {
    let variant = match product.variant.as_str() {
        "default" => String::new(),
        variant => format!("/{variant}"),
    };
    let architecture = match product.platform() {
        Some(platform) if platform == Platform::host() => String::new(),
        _ => format!("/{}", product.architecture),
    };
    let plain = format!("{}/{}{variant}", product.os.to_lowercase(), product.release);
    let names = std::iter::once(&plain).chain(&product.aliases);
    names
        .filter_map(|name| format!("{remote}:{name}{architecture}").parse().ok())
        .next()
}
