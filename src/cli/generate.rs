//! `vlmq generate`

use super::progress::Progress;
use super::prompt::PromptArgs;
use super::{Caller, Done, ModelArg, SCHEMA, open_model};
use crate::families::open_processor;
use crate::model::LoadedModel;
use crate::model::generation::Request;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
}

pub fn run(args: &Args, caller: &Caller) -> anyhow::Result<Done> {
    let source = open_model(&args.model.model)?;
    let processor = open_processor(&args.model.model)?;
    let input = args.prompt.encode(&processor)?;
    let model = LoadedModel::load(source)?;
    let features = input.images.iter().map(|image| model.image_features(image));
    let features = features.collect::<crate::Result<Vec<_>>>()?;
    let progress = Progress::silent_about_signals(caller);
    let start = model.nothing();
    let request = Request {
        prefix: &start,
        input: &input,
        features,
        max_new_tokens: args.max_new_tokens,
        first_ids: Vec::new(),
    };
    let answers = model.generate(&[request], processor.eos_ids(), &|_| progress.go_on())?;
    let ids: Vec<u32> = answers.into_iter().flat_map(|a| a.ids).collect();
    let text = processor.decode(&ids)?;
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "generate",
        "n_prompt_tokens": input.input_ids.len(),
        "output_ids": ids,
        "text": text,
    });
    Ok(Done::new(json, text + "\n"))
}
