//! `vlmq trace`: what a forward pass computed, as safetensors.

use super::prompt::PromptArgs;
use super::{Done, ModelArg, SCHEMA, open_model};
use crate::Error;
use crate::families::open_processor;
use crate::importance::end_loss::answer_gradients;
use crate::importance::walk::{Sequence, answer_places};
use crate::model::vision::ImageFeatures;
use crate::model::{LoadedModel, Projection};
use crate::processor::ModelInput;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Lay this answer before the model, and write too: the places that predict it (answer_places),
    /// their cross-entropy (loss), and its gradients at the outputs of all linears of the decoder
    /// (gradients.LAYER.MODULE)
    #[arg(long, value_name = "TEXT")]
    answer: Option<String>,
    /// File to write: input_ids, position_ids, pixel_values, image_grid_thw, image_features, logits
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    if args.output.exists() {
        return Err(Error::Exists {
            path: args.output.clone(),
        }
        .into());
    }
    let processor = open_processor(&args.model.model)?;
    let model = LoadedModel::load(open_model(&args.model.model)?)?;
    let input = match &args.answer {
        None => args.prompt.encode(&processor)?,
        Some(answer) => args.prompt.encode_answered(&processor, answer)?,
    };
    let features = input.images.iter().map(|image| model.image_features(image));
    let features = features.collect::<crate::Result<Vec<_>>>()?;
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
    if args.answer.is_some() {
        tensors.extend(gradient_tensors(&model, &input, &features)?);
    }
    candle_core::safetensors::save(&tensors, &args.output)?;
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "trace",
        "output": args.output,
        "n_tokens": n,
    });
    Ok(Done::new(json, String::new()))
}

/// The loss of the answer and its gradients.
fn gradient_tensors(
    model: &LoadedModel,
    input: &ModelInput,
    features: &[ImageFeatures],
) -> crate::Result<Vec<(String, Tensor)>> {
    let source = model.source();
    let embedded = source.embed(&input.input_ids, features)?;
    let context = source.context(input, &source.positions(input)?)?;
    let sequence = Sequence {
        embeddings: embedded.rows,
        context: context.with_deepstack(embedded.deepstack),
    };
    let (loss, layers) = answer_gradients(source, model.head(), sequence, input)?;
    let places = answer_places(&input.classes);
    let places: Vec<i64> = places.into_iter().map(i64::from).collect();
    let n = places.len();
    let mut tensors = vec![
        ("loss".to_owned(), Tensor::new(loss, &Device::Cpu)?),
        (
            "answer_places".to_owned(),
            Tensor::from_vec(places, n, &Device::Cpu)?,
        ),
    ];
    for (layer_idx, gradients) in layers.into_iter().enumerate() {
        let (attention, mlp) = (gradients.attention, gradients.mlp);
        let parts = [attention.q, attention.k, attention.v, attention.o];
        let parts = parts.into_iter().chain([mlp.gate, mlp.up, mlp.down]);
        for (projection, gradient) in Projection::ALL.into_iter().zip(parts) {
            let name = format!("gradients.{layer_idx}.{}", projection.name());
            tensors.push((name, gradient));
        }
    }
    Ok(tensors)
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
