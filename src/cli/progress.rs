//! Progress on stderr or to a program, and the end by Ctrl-C or by that program.

use super::caller::{Caller, Ear, Listener, Step};
use super::tell;
use crate::pipeline::Observer;
use crate::{Error, Result};
use anyhow::Context;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Between two pictures of the turning sign.
const TICK: Duration = Duration::from_millis(120);

static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Where a run stands.
pub struct Progress {
    shown: Shown,
    /// Steps of the whole, and under them the present stage of one.
    lines: MultiProgress,
    bar: OnceLock<ProgressBar>,
    stage: Mutex<Stage>,
}

/// How progress is shown.
enum Shown {
    /// As bars with the time left, on a terminal.
    Bars,
    /// As plain lines.
    Lines,
    /// Not at all.
    Nothing,
    /// To a program, which may end the command as well.
    Told(Arc<dyn Listener>, Mutex<Step>),
}

/// The stage that a layer is in, and what each took in the layer before.
#[derive(Default)]
struct Stage {
    bar: Option<ProgressBar>,
    name: String,
    since: Option<Instant>,
    this_layer: BTreeMap<String, Duration>,
    last_layer: BTreeMap<String, Duration>,
}

impl Progress {
    /// At a terminal begins to listen for Ctrl-C, which ends the run at its next step.
    pub fn start(caller: &Caller) -> anyhow::Result<Self> {
        if !caller.is_terminal() {
            return Ok(Self::silent_about_signals(caller));
        }
        ctrlc::set_handler(|| {
            if CANCELLED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            tell("stopping; press Ctrl-C again to stop without tidying up");
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(Self::silent_about_signals(caller))
    }

    /// As [`Progress::start`] without listening.
    pub fn silent_about_signals(caller: &Caller) -> Self {
        let shown = match &caller.ear {
            Ear::Listener(listener) => Shown::Told(listener.clone(), Mutex::default()),
            Ear::Terminal { is_quiet: true } => Shown::Nothing,
            Ear::Terminal { .. } if std::io::stderr().is_terminal() => Shown::Bars,
            Ear::Terminal { .. } => Shown::Lines,
        };
        Self {
            shown,
            lines: MultiProgress::new(),
            bar: OnceLock::new(),
            stage: Mutex::default(),
        }
    }

    fn bar(&self, n: usize) -> &ProgressBar {
        self.bar.get_or_init(|| {
            let bar = self.lines.add(ProgressBar::new(n as u64));
            styled(bar, "{msg} {wide_bar} {pos}/{len}, {eta} left")
        })
    }

    /// So many more of `n` steps are done.
    pub fn step(&self, what: &str, n_more: usize, n: usize) {
        match &self.shown {
            _ if n_more == 0 => {}
            Shown::Bars => {
                let bar = self.bar(n);
                bar.set_message(what.to_owned());
                bar.inc(n_more as u64);
            }
            Shown::Told(..) => self.advise(|step| {
                what.clone_into(&mut step.what);
                (step.n_done, step.n) = (step.n_done + n_more, n);
            }),
            Shown::Lines | Shown::Nothing => {}
        }
    }

    /// An error if the command is to end, for work that is not watched by an [`Observer`].
    pub fn go_on(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Tells a program how far the command has come now.
    fn advise(&self, change: impl FnOnce(&mut Step)) {
        if let Shown::Told(listener, step) = &self.shown {
            let mut step = step.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut step);
            listener.on_step(step.clone());
        }
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        if let Some(bar) = &self.stage().bar {
            bar.finish_and_clear();
        }
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        // What a panic left half done is a line on a terminal.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stage {
    /// The present stage is over; the next is `name`, or the next layer's first.
    fn turn(&mut self, name: &str) {
        if let Some(since) = self.since.take() {
            let spent = self.this_layer.entry(self.name.clone()).or_default();
            *spent += since.elapsed();
        }
        self.name = name.to_owned();
        self.since = Some(Instant::now());
    }

    /// What is said of it: its name, and how much of it is left if it takes as long as in the layer
    /// before.
    fn text(&self) -> String {
        let spent = self.this_layer.get(&self.name).copied().unwrap_or_default();
        let before = self.last_layer.get(&self.name);
        match before.map(|before| before.saturating_sub(spent).as_secs()) {
            Some(left) if left > 0 => format!("{}, about {left} s", self.name),
            _ => self.name.clone(),
        }
    }
}

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

impl Observer for Progress {
    fn on_layer(&self, layer_idx: usize, n_layers: usize) {
        match &self.shown {
            Shown::Bars => {
                let bar = self.bar(n_layers);
                bar.set_message("layers");
                bar.set_position(layer_idx as u64);
                let mut stage = self.stage();
                stage.turn("");
                stage.last_layer = std::mem::take(&mut stage.this_layer);
            }
            Shown::Lines => tell(&format!("layer {} of {n_layers}", layer_idx + 1)),
            Shown::Told(..) => self.advise(|step| {
                *step = Step {
                    what: "layers".into(),
                    n_done: layer_idx,
                    n: n_layers,
                    stage: None,
                };
            }),
            Shown::Nothing => {}
        }
    }

    fn on_stage(&self, name: &str) {
        self.advise(|step| step.stage = Some(name.to_owned()));
        let mut stage = self.stage();
        if !matches!(self.shown, Shown::Bars) || stage.name == name {
            return;
        }
        stage.turn(name);
        let text = stage.text();
        let bar = stage.bar.get_or_insert_with(|| {
            let bar = self.lines.add(ProgressBar::new_spinner());
            bar.enable_steady_tick(TICK);
            styled(bar, "{spinner} {msg}")
        });
        bar.set_message(text);
    }

    fn is_cancelled(&self) -> bool {
        match &self.shown {
            Shown::Told(listener, _) => listener.is_cancelled(),
            _ => CANCELLED.load(Ordering::SeqCst),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_tells_what_is_left_of_it_by_the_layer_before() {
        let mut stage = Stage::default();
        stage.turn("solve");
        assert_eq!(stage.text(), "solve");
        let seconds = Duration::from_secs;
        stage.last_layer =
            BTreeMap::from([("solve".into(), seconds(9)), ("load".into(), seconds(1))]);
        assert_eq!(stage.text(), "solve, about 9 s");
        stage.this_layer.insert("solve".into(), seconds(4));
        assert_eq!(stage.text(), "solve, about 5 s");
        stage.this_layer.insert("solve".into(), seconds(12));
        assert_eq!(stage.text(), "solve");
        stage.turn("load");
        assert!(stage.this_layer["solve"] >= seconds(12));
    }
}
