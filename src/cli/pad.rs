//! `vlmq pad`

use super::{Done, ModelArg, SCHEMA, open_model};
use crate::transform::{PaddingSettings, pad_folder};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// Devices that are to share the model
    #[arg(long, value_name = "N")]
    for_tp: usize,
    /// Group size that it will be quantized with
    #[arg(long, value_name = "N", default_value_t = 128)]
    group_size: usize,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let model = open_model(&args.model.model)?;
    let settings = PaddingSettings {
        n_devices: args.for_tp,
        group_size: args.group_size,
    };
    let padded = pad_folder(&model, settings, &args.output)?;
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "pad",
        "output": args.output,
        "padded": padded,
    });
    let text = format!(
        "MLPs {} wide instead of {}: {} tensors grown, {} copied\nwrote {} ({:.1} MB of tensors)\n",
        padded.to,
        padded.from,
        padded.n_changed,
        padded.n_copied,
        args.output.display(),
        padded.tensor_bytes as f64 / 1e6,
    );
    Ok(Done::new(json, text))
}
