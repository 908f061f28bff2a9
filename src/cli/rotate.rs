//! `vlmq rotate`

use super::{Done, ModelArg, SCHEMA, open_model};
use crate::transform::{RotationKind, RotationSettings, rotate_folder};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// What the residual stream is turned by
    #[arg(long, value_enum, default_value_t)]
    kind: KindArg,
    /// Seed of the rotation
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Write turned tensors in float32, so that nothing but f32 rounding is lost
    #[arg(long)]
    float32: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum KindArg {
    /// A Hadamard matrix with random signs; a random part where the width is no power of two
    #[default]
    Hadamard,
    /// Any orthogonal matrix, all equally likely; slow where the model is wide
    Random,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let model = open_model(&args.model.model)?;
    let settings = RotationSettings {
        kind: match args.kind {
            KindArg::Hadamard => RotationKind::Hadamard,
            KindArg::Random => RotationKind::Random,
        },
        seed: args.seed,
        in_f32: args.float32,
    };
    let rotated = rotate_folder(&model, settings, &args.output)?;
    let megabytes = rotated.tensor_bytes as f64 / 1e6;
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "rotate",
        "n_changed": rotated.n_changed,
        "n_copied": rotated.n_copied,
        "tensor_bytes": rotated.tensor_bytes,
    });
    let text = format!(
        "wrote {} ({megabytes:.1} MB of tensors, {} of them turned)\n",
        args.output.display(),
        rotated.n_changed,
    );
    Ok(Done::new(json, text))
}
