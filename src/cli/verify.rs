//! `vlmq verify`

use super::{Done, ModelArg, SCHEMA, open_model};
use crate::checkpoint::Checkpoint;
use crate::families::open_processor;
use crate::gguf::gguf_files;
use crate::verification::{Verification, verify_folder, verify_gguf_folder};
use std::path::{Path, PathBuf};

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

/// Not good if anything is wrong.
pub fn run(args: &Args) -> anyhow::Result<Done> {
    let source = args.against.as_deref().map(Checkpoint::open).transpose()?;
    let folder = &args.model.model;
    let found = match gguf_files(folder).is_ok_and(|files| !files.is_empty()) {
        true => verify_gguf_files(folder, source.as_ref())?,
        false => verify_checkpoint(folder, source.as_ref())?,
    };
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "verify",
        "verification": found,
    });
    Ok(Done {
        is_good: found.problems.is_empty(),
        ..Done::new(json, text(&found))
    })
}

/// The files, and if a tower is among them that the folder is a model.
fn verify_gguf_files(folder: &Path, source: Option<&Checkpoint>) -> anyhow::Result<Verification> {
    let mut found = verify_gguf_folder(folder, source)?;
    if gguf_files(folder)?.len() > 1 {
        found.problems.extend(use_of(folder));
    }
    Ok(found)
}

fn verify_checkpoint(folder: &Path, source: Option<&Checkpoint>) -> anyhow::Result<Verification> {
    let mut found = verify_folder(&Checkpoint::open(folder)?, source)?;
    found.problems.extend(use_of(folder));
    Ok(found)
}

/// What keeps a program from making of the folder what it must be: a model with all its tensors, and
/// its processor.
fn use_of(folder: &Path) -> impl Iterator<Item = String> {
    let opened = open_model(folder).err().map(|e| e.to_string());
    let processor = open_processor(folder).err().map(|e| e.to_string());
    opened.into_iter().chain(processor)
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
