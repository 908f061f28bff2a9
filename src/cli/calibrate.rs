//! `vlmq calibrate`

use super::progress::Progress;
use super::quantize::{memory_bytes, parse_bytes};
use super::{Caller, Done, ModelArg, SCHEMA, open_model};
use crate::Error;
use crate::dataset::open_samples;
use crate::plan::{ScaleDtype, Scheme};
use crate::processor::MAX_TEXT_TOKENS;
use crate::recipe::{Method, Recipe};
use crate::run::{SampleChoice, calibrate_folder};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// Samples, as for `vlmq quantize`
    #[arg(long, value_name = "DATA")]
    calibration: PathBuf,
    /// Folder of statistics to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Which method's weights of tokens: gptq (all alike), vlmq-v1, vlmq-v2; importance needs
    /// `--set importance_loss=answer`, or another that asks for no quantized stream
    #[arg(long, default_value = "gptq")]
    method: String,
    /// Turn a setting of importance; repeat it for several
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// How many samples, of all shards together
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Seed of the choice of samples
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Raw texts are read in pieces of at most so many tokens
    #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS)]
    max_tokens: usize,
    /// The I-th of N shards of the samples alone; `vlmq merge` adds them up
    #[arg(long, value_name = "I/N", value_parser = parse_shard, default_value = "1/1")]
    shard: (usize, usize),
    /// Memory to stay below: hidden states that do not fit go to disk
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    memory: Option<u64>,
}

/// Place from 0 and number of a shard told as `2/8`.
fn parse_shard(text: &str) -> Result<(usize, usize), String> {
    let expected = || "I/N with 1 <= I <= N <= 65536 expected, as 2/8".to_owned();
    let (place, n) = text.split_once('/').ok_or_else(expected)?;
    let numbers = place.parse().ok().zip(n.parse().ok());
    let (place, n): (usize, usize) = numbers.ok_or_else(expected)?;
    match (1..=n).contains(&place) && n <= 65536 {
        true => Ok((place - 1, n)),
        false => Err(expected()),
    }
}

pub fn run(args: &Args, caller: &Caller) -> anyhow::Result<Done> {
    let model = open_model(&args.model.model)?;
    let method: Method = args.method.parse()?;
    // The number format has no part in what linears see.
    let scheme = Scheme::new(4, None, false, ScaleDtype::F32)?;
    let mut recipe = Recipe::new(method, scheme);
    if matches!(method, Method::VlmqV1 | Method::VlmqV2) {
        recipe.set("alpha=0")?;
    }
    for assignment in &args.set {
        if !assignment.starts_with("importance_") && !assignment.starts_with("statistics_") {
            return Err(Error::Invalid {
                what: format!("--set {assignment}"),
                why: "settings of importance and statistics_dtype expected; the others are of \
                      `vlmq quantize`"
                    .into(),
            }
            .into());
        }
        recipe.set(assignment)?;
    }
    let choice = SampleChoice {
        set: open_samples(&args.calibration)?,
        n_samples: args.samples,
        seed: args.seed,
        max_tokens: args.max_tokens,
    };
    let progress = Progress::start(caller)?;
    let (output, memory) = (&args.output, memory_bytes(args.memory));
    let made = calibrate_folder(
        &model, &recipe, &choice, args.shard, memory, output, &progress,
    );
    progress.finish();
    let made = made?;
    let (place, n_shards) = (args.shard.0 + 1, args.shard.1);
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "calibrate",
        "output": args.output,
        "shard": place,
        "n_shards": n_shards,
        "n_sequences": made.n_sequences,
        "n_layers": made.n_layers,
        "n_groups": made.n_groups,
    });
    let text = format!(
        "{} layers, {} groups of linears, {} sequences (shard {place} of {n_shards})\nwrote {}\n",
        made.n_layers,
        made.n_groups,
        made.n_sequences,
        args.output.display()
    );
    Ok(Done::new(json, text))
}
