//! Progress on stderr, and the end by Ctrl-C.

use super::tell;
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use vlmq::pipeline::Observer;

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// A bar with the time left on a terminal, plain lines elsewhere.
pub struct Progress {
    bar: OnceLock<ProgressBar>,
    on_terminal: bool,
}

impl Progress {
    /// Begins to listen for Ctrl-C, which ends the run at its next step.
    pub fn start() -> anyhow::Result<Self> {
        ctrlc::set_handler(|| {
            if CANCELLED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            tell("stopping; press Ctrl-C again to stop without tidying up");
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(Self::silent_about_signals())
    }

    /// As [`Progress::start`] without listening.
    pub fn silent_about_signals() -> Self {
        Self {
            bar: OnceLock::new(),
            on_terminal: std::io::stderr().is_terminal(),
        }
    }

    fn bar(&self, n: usize) -> &ProgressBar {
        self.bar.get_or_init(|| {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {eta} left");
            let bar = ProgressBar::new(n as u64);
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        })
    }

    /// One of `n` steps is done.
    pub fn step(&self, what: &str, n: usize) {
        if self.on_terminal {
            let bar = self.bar(n);
            bar.set_message(what.to_owned());
            bar.inc(1);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn on_layer(&self, layer_idx: usize, n_layers: usize) {
        if self.on_terminal {
            let bar = self.bar(n_layers);
            bar.set_message("layers");
            bar.set_position(layer_idx as u64);
        } else {
            tell(&format!("layer {} of {n_layers}", layer_idx + 1));
        }
    }

    fn is_cancelled(&self) -> bool {
        CANCELLED.load(Ordering::SeqCst)
    }
}
