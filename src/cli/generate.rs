//! `vlmq generate`

use super::prompt::PromptArgs;
use super::{ModelArg, SCHEMA, open_model, print_json, say};
use std::process::ExitCode;
use vlmq::families::open_processor;
use vlmq::model::LoadedModel;
use vlmq::model::generation::Request;

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

pub fn run(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let source = open_model(&args.model.model)?;
    let processor = open_processor(&args.model.model)?;
    let input = args.prompt.encode(&processor)?;
    let model = LoadedModel::load(source)?;
    let features = input.images.iter().map(|image| model.image_features(image));
    let features = features.collect::<vlmq::Result<Vec<_>>>()?;
    let start = model.nothing();
    let request = Request {
        prefix: &start,
        input: &input,
        features,
        max_new_tokens: args.max_new_tokens,
    };
    let answers = model.generate(&[request], processor.eos_ids(), &|| {})?;
    let ids = answers.concat();
    let text = processor.decode(&ids)?;
    if json {
        print_json(serde_json::json!({
            "schema": SCHEMA,
            "command": "generate",
            "n_prompt_tokens": input.input_ids.len(),
            "output_ids": ids,
            "text": text,
        }))?;
    } else {
        say(&(text + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
