//! `vlmq completions` and `vlmq man`: what a package puts beside the program.

use super::{Cli, Done};
use crate::Error;
use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(clap::Args)]
pub struct ManArgs {
    /// Folder for the pages of all commands, vlmq.1, vlmq-quantize.1 and so on
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub fn completions(args: &CompletionArgs) -> anyhow::Result<Done> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vlmq", &mut script);
    let script = String::from_utf8(script).context("the script is not UTF-8")?;
    Ok(Done::of_text(script))
}

pub fn man(args: &ManArgs) -> anyhow::Result<Done> {
    let command = Cli::command();
    let Some(folder) = &args.output else {
        let mut page = Vec::new();
        let rendered = clap_mangen::Man::new(command).render(&mut page);
        rendered.context("cannot make the page")?;
        let page = String::from_utf8(page).context("the page is not UTF-8")?;
        return Ok(Done::of_text(page));
    };
    let fail = |e| Error::io(folder, "write the pages into", e);
    std::fs::create_dir_all(folder).map_err(fail)?;
    clap_mangen::generate_to(command, folder).map_err(fail)?;
    Ok(Done::of_text(String::new()))
}
