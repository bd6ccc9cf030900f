//! `inspect`: all about anything.

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use longshore_client::{
    Client, Error,
    proto::{GetContainerRequest, GetImageRequest, GetNetworkRequest, GetSandboxRequest},
};
use serde_json::Value;

use crate::{
    app::App,
    complete::{Every, Live},
    error::Problem,
    exit_code::ExitCode,
    find::Things,
    output::json,
};

/// What a name can be the name of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Container,
    Pod,
    Image,
    Network,
}

/// Shows an array with one object for each name, as JSON or (with -o yaml) as YAML
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Look only among these; otherwise the first of them that has the name
    #[arg(short, long, value_enum)]
    r#type: Option<Kind>,
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(Every(Live::Anything)))]
    names: Vec<String>,
}

impl Inspect {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let things = Things::read(&client).await?;
        let mut found = Vec::new();
        for name in &self.names {
            let value = match self.r#type {
                Some(kind) => inspect(&client, &things, kind, name).await?,
                None => any(&client, &things, name).await?,
            };
            found.push(value);
        }
        app.output.data(&Value::Array(found))?;
        Ok(ExitCode::OK)
    }
}

/// The first kind of thing that has the name, containers before all others.
async fn any(client: &Client, things: &Things, name: &str) -> Result<Value> {
    for kind in [Kind::Container, Kind::Pod, Kind::Image, Kind::Network] {
        match inspect(client, things, kind, name).await {
            Err(error) if absent(&error, kind) => {}
            result => return result,
        }
    }
    Err(Problem::NotFound {
        kind: "pod, container, image or network",
        name: name.to_owned(),
    }
    .into())
}

/// Whether nothing of this kind has the name; that it cannot be a name of this kind is the same.
fn absent(error: &anyhow::Error, kind: Kind) -> bool {
    if let Some(Problem::NotFound { .. }) = error.downcast_ref::<Problem>() {
        return true;
    }
    let Some(error) = error.downcast_ref::<Error>() else {
        return false;
    };
    let malformed = error
        .refusal()
        .is_some_and(|refusal| refusal.code == tonic::Code::InvalidArgument);
    error.is_not_found()
        || (malformed
            && matches!(kind, Kind::Image | Kind::Network)
            && error.reason() != Some(longshore_client::Reason::AmbiguousId))
}

async fn inspect(client: &Client, things: &Things, kind: Kind, name: &str) -> Result<Value> {
    match kind {
        Kind::Container => {
            let request = GetContainerRequest {
                container_id: things.find_named_container(name)?.id.clone(),
                verbose: true,
            };
            let answer = client
                .repeat(request, |client, request| async move {
                    client.lifecycle().get_container(request).await
                })
                .await?;
            opened(
                json(&answer)?,
                &[("ociSpecJson", "ociSpec"), ("infoJson", "info")],
            )
        }
        Kind::Pod => {
            let request = GetSandboxRequest {
                sandbox_id: things.find_pod(name)?.id.clone(),
                verbose: true,
            };
            let answer = client
                .repeat(request, |client, request| async move {
                    client.lifecycle().get_sandbox(request).await
                })
                .await?;
            opened(json(&answer)?, &[("infoJson", "info")])
        }
        Kind::Image => {
            let request = GetImageRequest {
                image: name.to_owned(),
                verbose: true,
            };
            let answer = client
                .repeat(request, |client, request| async move {
                    client.images().get_image(request).await
                })
                .await?;
            opened(json(&answer)?, &[("configJson", "ociConfig")])
        }
        Kind::Network => {
            let request = GetNetworkRequest {
                name: name.to_owned(),
            };
            let answer = client
                .repeat(request, |client, request| async move {
                    client.networks().get_network(request).await
                })
                .await?;
            json(&answer)
        }
    }
}

/// Puts JSON that came as text into the object as what it is.
fn opened(mut value: Value, fields: &[(&str, &str)]) -> Result<Value> {
    let object = value.as_object_mut().context("a message is an object")?;
    for (text, field) in fields {
        let Some(Value::String(inside)) = object.remove(*text) else {
            continue;
        };
        if !inside.is_empty() {
            let parsed = serde_json::from_str(&inside).unwrap_or(Value::String(inside));
            object.insert((*field).to_owned(), parsed);
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_in_text_becomes_part_of_the_object() {
        let value = serde_json::json!({"infoJson": "{\"pid\": 7}", "ociSpecJson": "", "a": 1});
        let value = opened(value, &[("infoJson", "info"), ("ociSpecJson", "ociSpec")]);
        assert_eq!(
            value.expect("an object"),
            serde_json::json!({"a": 1, "info": {"pid": 7}})
        );
    }
}
