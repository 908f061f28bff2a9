//! `vlmq verify`

use super::{ModelArg, SCHEMA, open_model, print_json, say};
use std::path::PathBuf;
use std::process::ExitCode;
use vlmq::checkpoint::Checkpoint;
use vlmq::families::open_processor;
use vlmq::verification::{Verification, verify_folder};

/// Modules that are named for their distance from the source.
const N_WORST: usize = 3;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// The model that it was made of, to compare with
    #[arg(long, value_name = "MODEL")]
    against: Option<PathBuf>,
}

/// Exits with 1 if anything is wrong.
pub fn run(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let source = args.against.as_deref().map(Checkpoint::open).transpose()?;
    let written = Checkpoint::open(&args.model.model)?;
    let mut found = verify_folder(&written, source.as_ref())?;
    // What a program must be able to make of it: a model with all its tensors, and its processor.
    let opened = open_model(&args.model.model).err().map(|e| e.to_string());
    let processor = open_processor(&args.model.model).err();
    found.problems.extend(opened);
    found.problems.extend(processor.map(|e| e.to_string()));
    match json {
        true => print_json(serde_json::json!({
            "schema": SCHEMA,
            "command": "verify",
            "verification": found,
        }))?,
        false => say(&text(&found))?,
    }
    Ok(match found.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    })
}

fn text(found: &Verification) -> String {
    let mut text = format!(
        "{}: {} quantized modules, {} other tensors\n",
        found.format, found.n_quantized, found.n_plain
    );
    if !found.changed.is_empty() {
        text += &format!(
            "{} plain tensors are not the source's, as its report says\n",
            found.changed.len()
        );
    }
    for module in found.modules.iter().take(N_WORST) {
        text += &format!(
            "far from the source: {:.3e} of the norm, {:.3e} at most  {}\n",
            module.relative_error, module.largest_error, module.name
        );
    }
    for problem in &found.problems {
        text += &format!("wrong: {problem}\n");
    }
    if found.problems.is_empty() {
        text += "nothing is wrong\n";
    }
    text
}
