//! `vlmq export`

use super::{Done, ModelArg, SCHEMA, open_model};
use crate::Error;
use crate::conversion::{export_folder, export_gguf};
use crate::export::gguf::GgufExported;
use crate::export::{Exported, Format};
use anyhow::Context;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// How it is written: compressed-tensors, gptq, awq, mlx, gguf, or numbers as bf16, f16, f32
    #[arg(long, value_name = "F")]
    format: Format,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// What `vlmq eval --json` printed of this model, for the model card
    #[arg(long, value_name = "FILE")]
    evaluation: Option<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let evaluation = args
        .evaluation
        .as_deref()
        .map(read_evaluation)
        .transpose()?;
    let model = open_model(&args.model.model)?;
    if args.format == Format::Gguf {
        let exported = export_gguf(&model, &args.output, evaluation.as_ref())?;
        let json = serde_json::json!({
            "schema": SCHEMA,
            "command": "export",
            "format": args.format.name(),
            "output": args.output,
            "gguf": exported,
        });
        return Ok(Done::new(json, gguf_text(args, &exported)));
    }
    let exported = export_folder(&model, args.format, &args.output, evaluation.as_ref())?;
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "export",
        "format": args.format.name(),
        "output": args.output,
        "n_modules": exported.n_quantized,
        "tensor_bytes": exported.tensor_bytes,
        "rounded_scales": exported.rounded_scales,
        "notes": exported.notes,
    });
    Ok(Done::new(json, text(args, &exported)))
}

fn read_evaluation(path: &Path) -> anyhow::Result<serde_json::Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    serde_json::from_str(&text).with_context(|| format!("{}: no JSON", path.display()))
}

fn gguf_text(args: &Args, exported: &GgufExported) -> String {
    let mut text = String::new();
    for file in [Some(&exported.model), exported.mmproj.as_ref()] {
        let Some(file) = file else { continue };
        let types: Vec<String> = file
            .n_tensors
            .iter()
            .map(|(name, n)| format!("{n} {name}"))
            .collect();
        let megabytes = file.tensor_bytes as f64 / 1e6;
        text += &format!("{} ({megabytes:.1} MB: {})\n", file.file, types.join(", "));
    }
    if let Some(why) = &exported.mmproj_absent {
        text += &format!("no mmproj file: {why}\n");
    }
    text + &format!("wrote {} (gguf)\n", args.output.display())
}

fn text(args: &Args, exported: &Exported) -> String {
    let rounded = exported.rounded_scales;
    let mut text = String::new();
    if rounded.n_rounded > 0 {
        text += &format!(
            "{} scales rounded to this format's type, by {:.1e} at most\n",
            rounded.n_rounded, rounded.largest_change
        );
    }
    for note in &exported.notes {
        text += &format!("note: {note}\n");
    }
    text += &format!(
        "wrote {} ({}, {} modules, {:.1} MB of tensors)\n",
        args.output.display(),
        args.format.name(),
        exported.n_quantized,
        exported.tensor_bytes as f64 / 1e6,
    );
    text
}
