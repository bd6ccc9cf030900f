//! A pull as people watch it: a bar per layer on a terminal, a line per finished layer elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use longshore_client::{
    Client, PullUpdate,
    proto::{LayerProgress, LayerState, PullImageRequest, PullProgress, PullStage, PulledImage},
};

use crate::{human, terminal};

/// How a pull is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    Bars,
    Lines,
    Nothing,
}

impl Show {
    /// Bars where lines can be redrawn, lines elsewhere.
    pub(crate) fn fitting(quiet: bool) -> Self {
        match (quiet, terminal::can_redraw()) {
            (true, _) => Self::Nothing,
            (false, true) => Self::Bars,
            (false, false) => Self::Lines,
        }
    }
}

/// Pulls and shows; all of it on standard error, so that standard output stays the result's.
pub(crate) async fn pull(
    client: &Client,
    request: PullImageRequest,
    show: Show,
) -> Result<PulledImage> {
    let mut pull = client.pull(request);
    let mut bars = (show == Show::Bars).then(Bars::new);
    let mut lines = (show == Show::Lines).then(Lines::default);
    loop {
        match pull.next().await {
            Ok(PullUpdate::Progress(progress)) => {
                if let Some(bars) = &mut bars {
                    bars.update(&progress);
                }
                for line in lines.iter_mut().flat_map(|lines| lines.update(&progress)) {
                    terminal::note(&line);
                }
            }
            Ok(PullUpdate::Done(image)) => {
                if let Some(bars) = &mut bars {
                    bars.finish();
                }
                return Ok(image);
            }
            Err(error) => {
                if let Some(bars) = &mut bars {
                    bars.finish();
                }
                return Err(error.into());
            }
        }
    }
}

/// A bar for so many bytes on their way to the agent; hidden where bars are not shown.
pub(crate) fn sending(bytes: u64, show: Show) -> ProgressBar {
    if show != Show::Bars {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("sending {wide_bar} {bytes}/{total_bytes}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Says what is new since the picture before.
#[derive(Debug, Default)]
struct Lines {
    stage: PullStage,
    finished: BTreeSet<String>,
}

impl Lines {
    fn update(&mut self, progress: &PullProgress) -> Vec<String> {
        let mut lines = Vec::new();
        for layer in &progress.layers {
            let what = match layer.state() {
                LayerState::Present => "already here",
                LayerState::Done => "done",
                _ => continue,
            };
            if self.finished.insert(layer.digest.clone()) {
                lines.push(format!(
                    "{}: {what} ({})",
                    human::short_id(&layer.digest),
                    human::bytes(layer.total_bytes.max(layer.fetched_bytes))
                ));
            }
        }
        if self.stage != progress.stage() {
            self.stage = progress.stage();
            let layers = progress.layers.len();
            match self.stage {
                PullStage::Resolving => lines.push("resolving".into()),
                PullStage::Fetching => lines.push(format!("fetching {layers} layers")),
                PullStage::Committing => lines.push("committing".into()),
                PullStage::Unspecified => {}
            }
        }
        lines
    }
}

struct Bars {
    all: MultiProgress,
    stage: ProgressBar,
    layers: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let stage = all.add(ProgressBar::new_spinner());
        stage.enable_steady_tick(Duration::from_millis(120));
        stage.set_message("resolving");
        Self {
            all,
            stage,
            layers: BTreeMap::new(),
        }
    }

    fn update(&mut self, progress: &PullProgress) {
        self.stage.set_message(match progress.stage() {
            PullStage::Resolving | PullStage::Unspecified => "resolving",
            PullStage::Fetching => "fetching and unpacking",
            PullStage::Committing => "committing",
        });
        for layer in &progress.layers {
            let all = &self.all;
            let bar = self.layers.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = all.add(ProgressBar::new(layer.total_bytes));
                bar.set_prefix(human::short_id(&layer.digest).to_owned());
                bar
            });
            draw(bar, layer);
        }
    }

    fn finish(&mut self) {
        for bar in self.layers.values().filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
        self.stage.finish_and_clear();
    }
}

fn draw(bar: &ProgressBar, layer: &LayerProgress) {
    let message = match layer.state() {
        LayerState::Unspecified | LayerState::Waiting => "waiting",
        LayerState::Fetching => "fetching",
        LayerState::Unpacking => "unpacking",
        LayerState::Done => "done",
        LayerState::Present => "already here",
    };
    bar.set_message(message);
    bar.set_length(layer.total_bytes.max(layer.fetched_bytes));
    bar.set_position(layer.fetched_bytes);
    let moving = matches!(layer.state(), LayerState::Fetching | LayerState::Unpacking);
    // A finished layer needs no bar: its size is what is left to know.
    let template = if moving {
        "{prefix:12} {msg:12} [{bar:30}] {binary_bytes:>11}/{binary_total_bytes:11} {binary_bytes_per_sec}"
    } else {
        "{prefix:12} {msg:12} {binary_total_bytes}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    if matches!(layer.state(), LayerState::Done | LayerState::Present) && !bar.is_finished() {
        bar.abandon();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(stage: PullStage, states: &[LayerState]) -> PullProgress {
        PullProgress {
            stage: stage.into(),
            layers: states
                .iter()
                .enumerate()
                .map(|(number, state)| LayerProgress {
                    digest: format!("sha256:{number}{}", "0".repeat(63)),
                    state: (*state).into(),
                    fetched_bytes: 1024,
                    total_bytes: 2048,
                })
                .collect(),
        }
    }

    #[test]
    fn a_line_comes_once_for_each_finished_layer_and_stage() {
        let mut lines = Lines::default();
        let resolving = picture(PullStage::Resolving, &[]);
        assert_eq!(lines.update(&resolving), ["resolving"]);
        assert!(lines.update(&resolving).is_empty());
        let fetching = picture(
            PullStage::Fetching,
            &[LayerState::Present, LayerState::Fetching],
        );
        assert_eq!(
            lines.update(&fetching),
            ["000000000000: already here (2.00KiB)", "fetching 2 layers"]
        );
        assert!(lines.update(&fetching).is_empty());
        let committing = picture(
            PullStage::Committing,
            &[LayerState::Present, LayerState::Done],
        );
        assert_eq!(
            lines.update(&committing),
            ["100000000000: done (2.00KiB)", "committing"]
        );
    }
}
