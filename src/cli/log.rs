//! Where the log goes: to stderr in words, to a file in JSON, or nowhere.

use anyhow::Context;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

#[derive(clap::Args)]
pub struct LogArgs {
    /// Tell each layer on stderr; twice, each module
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Add everything that there is to tell to this file, one JSON object a line
    #[arg(long, global = true, value_name = "FILE.jsonl")]
    log: Option<PathBuf>,
}

impl LogArgs {
    /// Begins to log.
    pub fn start(&self) -> anyhow::Result<()> {
        let level = match self.verbose {
            0 => LevelFilter::OFF,
            1 => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        };
        let words = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_target(false)
            .with_filter(level);
        let lines = self.log.as_deref().map(open).transpose()?.map(|file| {
            tracing_subscriber::fmt::layer()
                .json()
                .flatten_event(true)
                .with_target(false)
                .with_writer(Mutex::new(file))
                .with_filter(LevelFilter::DEBUG)
        });
        let log = tracing_subscriber::registry().with(words).with(lines);
        log.try_init().context("cannot begin to log")
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.map_err(|e| crate::Error::io(path, "open the log", e).into())
}
