//! `events`: what happens, from now on or from a place in the past, across restarts of the agent.

use anyhow::Result;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use longshore_client::proto::{Cursor, Event, EventKind, WatchRequest};

use crate::{
    app::App,
    complete::{First, Live},
    exit_code::ExitCode,
    find::{Target, Things},
    human,
    output::json,
    parse,
};

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begin with all that the agent remembers
    #[arg(short, long, conflicts_with = "cursor")]
    all: bool,
    /// Begin after this event, EPOCH.NUMBER as the first column shows it
    #[arg(long, value_parser = cursor, value_name = "CURSOR")]
    cursor: Option<Cursor>,
    /// End with what has happened until now
    #[arg(long)]
    no_follow: bool,
    /// Only these, as in container-exited
    #[arg(short, long = "kind", value_name = "KIND", value_parser = kind)]
    kinds: Vec<EventKind>,
    /// Only events of things with this label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = parse::pair)]
    labels: Vec<parse::Pair>,
    /// Only events of this pod or container
    #[arg(value_name = "POD|CONTAINER", add = ArgValueCompleter::new(First(Live::Targets)))]
    target: Option<String>,
}

fn cursor(text: &str) -> Result<Cursor, String> {
    text.split_once('.')
        .and_then(|(epoch, number)| {
            Some(Cursor {
                epoch: epoch.parse().ok()?,
                number: number.parse().ok()?,
            })
        })
        .ok_or_else(|| {
            format!("`{text}` is no place in the events: write EPOCH.NUMBER, as in 3.141")
        })
}

fn kind(text: &str) -> Result<EventKind, String> {
    let name = format!(
        "EVENT_KIND_{}",
        text.to_uppercase().replace(['-', ' '], "_")
    );
    EventKind::from_str_name(&name)
        .filter(|kind| *kind != EventKind::Unspecified)
        .ok_or_else(|| {
            let known: Vec<String> = (1..)
                .map_while(|number| EventKind::try_from(number).ok())
                .map(word)
                .collect();
            format!("`{text}` is not one of {}", known.join(", "))
        })
}

/// A kind as people write it, as in `container-exited`.
fn word(kind: EventKind) -> String {
    human::plain(kind.as_str_name(), "EVENT_KIND_").replace(' ', "-")
}

impl Events {
    pub(crate) async fn run(self, app: &App) -> Result<ExitCode> {
        let client = app.client().await?;
        let mut request = WatchRequest {
            cursor: self.cursor,
            kinds: self.kinds.iter().map(|kind| i32::from(*kind)).collect(),
            label_selector: super::container::labels(&self.labels),
            past_only: self.no_follow,
            ..Default::default()
        };
        if self.all || (self.no_follow && self.cursor.is_none()) {
            request.cursor = Some(Cursor::default());
        }
        if let Some(name) = &self.target {
            match Things::read(&client).await?.find(name)? {
                Target::Pod(pod) => request.sandbox_id = pod.id,
                Target::Container(container) => request.container_id = container.id,
            }
        }
        let mut watch = client.watch(request);
        while let Some(event) = watch.next().await? {
            if app.output.for_programs() {
                app.output.item(&json(&event)?)?;
            } else {
                app.output.line(&line(&event, app.output.wide()))?;
            }
        }
        Ok(ExitCode::OK)
    }
}

fn line(event: &Event, wide: bool) -> String {
    let cursor = event.cursor.unwrap_or_default();
    let time = human::time(event.time).map_or_else(|| "-".to_owned(), human::instant);
    let id = |id: &str| {
        if wide {
            id.to_owned()
        } else {
            human::short_id(id).to_owned()
        }
    };
    let mut words = vec![
        format!("{}.{}", cursor.epoch, cursor.number),
        time,
        word(event.kind()),
    ];
    let subjects = [
        ("container", &event.container_id),
        ("pod", &event.sandbox_id),
        ("image", &event.image_id),
    ];
    for (subject, value) in subjects.into_iter().filter(|(_, value)| !value.is_empty()) {
        words.push(format!("{subject}={}", id(value)));
    }
    let mut attributes: Vec<_> = event.attributes.iter().collect();
    attributes.sort();
    words.extend(
        attributes
            .into_iter()
            .map(|(key, value)| format!("{key}={value}")),
    );
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_and_kinds_are_read_as_they_are_shown() {
        assert_eq!(
            cursor("3.141"),
            Ok(Cursor {
                epoch: 3,
                number: 141
            })
        );
        for bad in ["3", "3.", ".1", "a.b", "3.1.4", ""] {
            assert!(cursor(bad).is_err(), "{bad}");
        }
        assert_eq!(kind("container-exited"), Ok(EventKind::ContainerExited));
        assert_eq!(
            kind(&word(EventKind::ImagePulled)),
            Ok(EventKind::ImagePulled)
        );
        let problem = kind("died").expect_err("no such kind");
        assert!(problem.contains("container-oom"), "{problem}");
    }

    #[test]
    fn an_event_is_one_line() {
        let event = Event {
            cursor: Some(Cursor {
                epoch: 2,
                number: 7,
            }),
            time: Some(prost_types::Timestamp {
                seconds: 0,
                nanos: 0,
            }),
            kind: EventKind::ContainerExited.into(),
            container_id: "0123456789abcdef".into(),
            attributes: [("reason", "error"), ("exit_code", "3")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        assert_eq!(
            line(&event, false),
            "2.7 1970-01-01T00:00:00Z container-exited container=0123456789ab exit_code=3 reason=error"
        );
    }
}
