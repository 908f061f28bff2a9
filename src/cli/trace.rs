//! `vlmq trace`: what a forward pass computed, as safetensors.

use super::prompt::PromptArgs;
use super::{ModelArg, SCHEMA, open_model, print_json};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use vlmq::Error;
use vlmq::families::open_processor;
use vlmq::model::LoadedModel;
use vlmq::model::vision::ImageFeatures;
use vlmq::processor::ModelInput;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    prompt: PromptArgs,
    /// File to write: input_ids, position_ids, pixel_values, image_grid_thw, image_features, logits
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    if args.output.exists() {
        return Err(Error::Exists {
            path: args.output.clone(),
        }
        .into());
    }
    let processor = open_processor(&args.model.model)?;
    let model = LoadedModel::load(open_model(&args.model.model)?)?;
    let input = args.prompt.encode(&processor)?;
    let features = input.images.iter().map(|image| model.image_features(image));
    let features = features.collect::<vlmq::Result<Vec<_>>>()?;
    let positions = model.source().positions(&input)?;
    let n = input.input_ids.len();
    let ids = |ids: &[u32]| ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
    let cpu = &Device::Cpu;
    let mut tensors = HashMap::from([
        (
            "input_ids".to_owned(),
            Tensor::from_vec(ids(&input.input_ids), n, cpu)?,
        ),
        (
            "position_ids".to_owned(),
            Tensor::from_vec(ids(&positions.ids.concat()), (3, n), cpu)?,
        ),
        ("logits".to_owned(), model.logits(&input, &features)?),
    ]);
    if !features.is_empty() {
        tensors.extend(image_tensors(&model, &input, &features)?);
    }
    candle_core::safetensors::save(&tensors, &args.output)?;
    if json {
        print_json(serde_json::json!({
            "schema": SCHEMA,
            "command": "trace",
            "output": args.output,
            "n_tokens": n,
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Patches, grids and features of all images, one after the other.
fn image_tensors(
    model: &LoadedModel,
    input: &ModelInput,
    features: &[ImageFeatures],
) -> candle_core::Result<Vec<(String, Tensor)>> {
    let patches = input.images.iter().map(|image| {
        let shape = (image.patches.rows(), image.patches.cols());
        Tensor::from_slice(image.patches.data(), shape, &Device::Cpu)
    });
    let patches = patches.collect::<candle_core::Result<Vec<_>>>()?;
    let grids = input.images.iter().flat_map(|image| image.grid_thw);
    let grids: Vec<i64> = grids.map(|side| side as i64).collect();
    let joined = |rows: fn(&ImageFeatures, usize) -> &Tensor, level: usize| {
        let rows: Vec<&Tensor> = features.iter().map(|f| rows(f, level)).collect();
        Tensor::cat(&rows, 0)
    };
    let mut tensors = vec![
        ("pixel_values".to_owned(), Tensor::cat(&patches, 0)?),
        (
            "image_features".to_owned(),
            joined(|f, _| &f.embeddings, 0)?,
        ),
        (
            "image_grid_thw".to_owned(),
            Tensor::from_vec(grids, (features.len(), 3), &Device::Cpu)?,
        ),
    ];
    for level in 0..model.source().vision().n_deepstack() {
        let name = format!("deepstack_features.{level}");
        tensors.push((name, joined(|f, level| &f.deepstack[level], level)?));
    }
    Ok(tensors)
}
