//! `vlmq quantize`

use super::launch::{self, Launch, n_local_ranks};
use super::progress::Progress;
use super::summary::summary;
use super::{Caller, Done, ModelArg, SCHEMA, open_model, open_model_on, tell};
use crate::Error;
use crate::checkpoint::DType;
use crate::dataset::open_samples;
use crate::export::Format;
use crate::families::open_processor;
use crate::journal::{Journal, Resume};
use crate::memory::{plan_disk, plan_memory};
use crate::model::ModelSource;
use crate::plan::{Bits, ScaleDtype, Scheme};
use crate::processor::MAX_TEXT_TOKENS;
use crate::recipe::{Method, Recipe};
use crate::report::free_memory_bytes;
use crate::run::{
    Room, RunOptions, SampleChoice, check_remaking, module_plan, quantize_folder_among,
    quantize_folder_from,
};
use crate::statistics::folder::StatisticsFolder;
use anyhow::Context;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Samples, with or without images: LLaVA, chat or raw-text JSONL, Hugging Face parquet,
    /// VLMEvalKit TSV, or a folder of them
    #[arg(long, value_name = "DATA")]
    calibration: Option<PathBuf>,
    /// Solve from what `vlmq calibrate` made, without samples
    #[arg(long, value_name = "DIR", conflicts_with_all = ["calibration", "report", "dry_run"])]
    statistics: Option<PathBuf>,
    /// Folder to make
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// How many samples
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Seed of the choice of samples
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Raw texts are read in pieces of at most so many tokens; conversations are never cut
    #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS)]
    max_tokens: usize,
    /// How it is written: compressed-tensors, gptq, awq, mlx, gguf, or numbers as bf16, f16, f32
    #[arg(long, value_name = "F", default_value = "compressed-tensors")]
    format: Format,
    /// What to do with the layers that an earlier run for the same output finished
    #[arg(long, value_enum, default_value_t)]
    resume: ResumeArg,
    /// In how many shards the samples are summed up, one after the other; the codes depend on it in
    /// their last bits, and not on how many ranks share the shards out. As many as an earlier run for
    /// the same output had, else as there are ranks, if absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    shards: Option<u32>,
    /// Memory to stay below, as 8GiB, 900MB or in bytes: hidden states that do not fit go to disk.
    /// Three quarters of what the system has free, shared by the ranks of a machine, if absent
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// The same of a GPU's memory: hidden states that do not fit stay in memory. All that is free if absent
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    device_memory: Option<u64>,
    /// Make the inputs of down_proj, the widest hidden states, again whenever they are wanted, rather than
    /// keep them: for less than half the room gate and up are walked through twice instead of once.
    /// What comes out is the same. A GPU without room for them does so by itself
    #[arg(long)]
    remake_inputs: bool,
    /// Also write imatrix.gguf, the importance of each linear's input columns as the samples have
    /// it, which `llama-quantize --imatrix` reads
    #[arg(long)]
    imatrix: bool,
    /// Also write report.html, a page with the losses beside those of rounding to nearest and with
    /// pictures of the importance of tokens, and vlmq_importance.json, which it draws them from;
    /// `vlmq report` makes the page again
    #[arg(long)]
    report: bool,
    /// Where to work: cpu, cuda:N, an NVIDIA GPU by its number, or cuda, the one with the number that this
    /// rank has on its machine
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// On a GPU: what the factors of the forward and backward passes' products are rounded to. tf32 has 10
    /// bits of mantissa and bf16 7, each several times as fast as the one before; statistics and solutions
    /// stay in full single precision
    #[arg(long, value_name = "f32|tf32|bf16", default_value = "f32")]
    products: String,
    /// Say what would be done and what it would cost, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum ResumeArg {
    /// Go on with them if there are any
    #[default]
    Auto,
    /// Go on with them; there must be some
    Required,
    /// Remove them
    Never,
}

impl From<ResumeArg> for Resume {
    fn from(arg: ResumeArg) -> Self {
        match arg {
            ResumeArg::Auto => Self::Auto,
            ResumeArg::Required => Self::Required,
            ResumeArg::Never => Self::Never,
        }
    }
}

/// Method, format and settings, as flags.
#[derive(clap::Args)]
pub struct RecipeArgs {
    /// rtn, awq, mbq, gptq, gptaq, qronos, vlmq-v1, vlmq-v2, vlmq
    #[arg(long, default_value = "vlmq")]
    method: String,
    /// Bits per weight: 2, 3, 4 or 8; or a mean between 2 and 4, as 2.5, that the codes of all
    /// quantized weights have at most: each module then gets 2, 3 or 4 by how much the samples'
    /// answers suffer. Scales and zero points come on top, as with a whole number
    #[arg(long, default_value = "4", allow_negative_numbers = true)]
    bits: String,
    /// Input columns that share a scale; -1 for one scale per output channel
    #[arg(
        long,
        value_name = "N",
        default_value_t = 128,
        allow_negative_numbers = true
    )]
    group_size: i64,
    /// Grid centred on zero
    #[arg(long, conflicts_with = "asymmetric")]
    symmetric: bool,
    /// Grid with a zero point (the default)
    #[arg(long)]
    asymmetric: bool,
    /// Rules per module, as TOML
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Turn a setting; repeat it for several
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RecipeArgs {
    /// The recipe for a model; scales are stored in the type that the format has for them.
    pub fn recipe(&self, model: &ModelSource, format: Format) -> crate::Result<Recipe> {
        let group_size = match self.group_size {
            -1 => None,
            n => Some(usize::try_from(n).map_err(|_| Error::Invalid {
                what: "--group-size".into(),
                why: format!("{n} given, a positive multiple of 8 or -1 (per channel) expected"),
            })?),
        };
        let bits: Bits = self.bits.parse()?;
        let scales = format.scale_dtype(scale_dtype(model));
        let scheme = Scheme::new(bits.ceil(), group_size, self.symmetric, scales)?;
        let mut recipe = Recipe::new(self.method.parse::<Method>()?, scheme).with_bits(bits);
        if let Some(path) = &self.recipe {
            recipe.read_rules(path)?;
        }
        for assignment in &self.set {
            recipe.set(assignment)?;
        }
        Ok(recipe)
    }
}

impl Args {
    fn room(&self) -> Room {
        Room {
            memory_bytes: memory_bytes(self.memory),
            device_bytes: self.device_memory,
            remakes_inputs: self.remake_inputs,
        }
    }
}

/// As told, else what is free.
pub fn memory_bytes(told: Option<u64>) -> u64 {
    let n_ranks = n_local_ranks() as u64;
    let free = || free_memory_bytes().map(|bytes| bytes / 4 * 3 / n_ranks);
    told.or_else(free).unwrap_or(u64::MAX)
}

/// Bytes from a number with or without a unit.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => {
            return Err(format!(
                "unit {other:?}; B, kB, MB, GB, KiB, MiB or GiB expected"
            ));
        }
    };
    let number: f64 = digits.parse().map_err(|_| "a number expected".to_owned())?;
    match number.is_finite() && number > 0.0 {
        true => Ok((number * unit as f64) as u64),
        false => Err("a positive number expected".into()),
    }
}

/// The type that the model's weights have, which its readers will give the scales too.
pub fn scale_dtype(model: &ModelSource) -> ScaleDtype {
    let module = model.layer_modules(0).into_iter().next();
    let info = module.and_then(|m| model.checkpoint().linear_info(&m.name));
    match info.map(|(dtype, _)| dtype) {
        Some(DType::F16) => ScaleDtype::F16,
        Some(DType::F32 | DType::F64) => ScaleDtype::F32,
        _ => ScaleDtype::Bf16,
    }
}

pub fn run(args: &Args, caller: &Caller) -> anyhow::Result<Done> {
    let device = launch::device(&args.device)?;
    // What would be done is the same everywhere; a plan needs no GPU.
    let model = match args.dry_run {
        true => open_model(&args.model.model)?,
        false => open_model_on(&args.model.model, device.open(args.products.parse()?)?)?,
    };
    let recipe = args.recipe.recipe(&model, args.format)?;
    let choice = match (&args.calibration, recipe.needs_calibration()) {
        (Some(path), true) => Some(SampleChoice {
            set: open_samples(path)?,
            n_samples: args.samples,
            seed: args.seed,
            max_tokens: args.max_tokens,
        }),
        _ => None,
    };
    if args.dry_run {
        return dry_run(args, &model, &recipe, choice.as_ref());
    }
    let output = args.output.as_deref().context("--output DIR is needed")?;
    // A program's environment is not about the commands that it gives.
    let launch = match caller.is_terminal() {
        true => Launch::from_environment()?,
        false => Launch::alone(),
    };
    let progress = match launch.is_first() {
        true => Progress::start(caller)?,
        false => Progress::start(&caller.quiet())?,
    };
    let options = RunOptions {
        format: args.format,
        resume: args.resume.into(),
        room: args.room(),
        imatrix: args.imatrix,
        report: args.report,
        n_shards: args.shards.map(|n| n as usize),
        command: Some(command(&caller.words)),
    };
    let communicator = launch.communicator();
    let choice = choice.as_ref();
    let outcome = match &args.statistics {
        Some(dir) if communicator.is_alone() => StatisticsFolder::open(dir).and_then(|folder| {
            quantize_folder_from(&model, &folder, &recipe, output, options, &progress).map(Some)
        }),
        Some(_) => {
            let what = "--statistics with several ranks; start one".into();
            Err(Error::Unsupported { what })
        }
        None => quantize_folder_among(
            communicator,
            &model,
            &recipe,
            choice,
            output,
            options,
            &progress,
        ),
    };
    progress.finish();
    let tell_kept = |error: &Error| {
        if caller.is_terminal() {
            tell_what_is_kept(error, output);
        }
    };
    let outcome = outcome.inspect_err(|error| {
        launch.end(error, || tell_kept(error));
        tell_kept(error);
    })?;
    let Some((report, exported)) = outcome else {
        return Ok(Done::of_text(String::new()));
    };
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "quantize",
        "output": output,
        "tensor_bytes": exported.tensor_bytes,
        "report": report,
    });
    let megabytes = exported.tensor_bytes as f64 / 1e6;
    let wrote = format!(
        "wrote {} ({megabytes:.1} MB of tensors)\n",
        output.display()
    );
    Ok(Done::new(json, summary(&report, args.format) + &wrote))
}

/// The command as it would be typed. A report is published with its model, and where the folders of a
/// machine lie is nobody's business: of whole paths the last names are told alone.
fn command(words: &[OsString]) -> String {
    let told = |word: &OsString| {
        let path = Path::new(word);
        let name = path.file_name().filter(|_| path.is_absolute());
        let text = name.unwrap_or(word).to_string_lossy().into_owned();
        let is_plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
        match !text.is_empty() && text.chars().all(is_plain) {
            true => text,
            false => format!("'{}'", text.replace('\'', "'\\''")),
        }
    };
    let words: Vec<String> = words.iter().map(told).collect();
    format!("vlmq {}", words.join(" "))
}

/// After a failure: which work the next run of the same command need not do again.
fn tell_what_is_kept(error: &Error, output: &Path) {
    let is_of_others = matches!(
        error,
        Error::Busy { .. } | Error::OtherRun { .. } | Error::Exists { .. }
    );
    if let Some((dir, n_layers)) = Journal::kept(output).filter(|_| !is_of_others) {
        let dir = dir.display();
        tell(&format!(
            "note: {n_layers} finished layers are kept in {dir}; the same command goes on"
        ));
    }
}

/// Tokens of each sequence of the samples.
fn count(args: &Args, choice: &SampleChoice) -> crate::Result<Vec<usize>> {
    let processor = open_processor(&args.model.model)?;
    let chosen = choice.set.choose(choice.n_samples, choice.seed)?;
    let n_tokens = crate::calibration::count_tokens(&processor, &chosen, choice.max_tokens)?;
    Ok(n_tokens.concat())
}

/// How many modules a mean of bits will be shared out to.
fn shared_modules(model: &ModelSource, recipe: &Recipe) -> usize {
    let modules = model.modules().into_iter();
    modules
        .filter(|module| recipe.shares_bits(&module.name))
        .count()
}

/// Empty where nothing is shared out.
fn shared_text(recipe: &Recipe, n_modules: usize) -> String {
    match n_modules {
        0 => String::new(),
        n => format!(
            "bits   {:>8} on average at most; which of {:?} each of {n} modules gets is measured \
             before the first layer\n",
            recipe.bits(),
            Bits::SHARED
        ),
    }
}

fn dry_run(
    args: &Args,
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
) -> anyhow::Result<Done> {
    let modules = module_plan(model, recipe)?;
    args.format.check(model.checkpoint(), &modules)?;
    if let Some(output) = args.output.as_deref().filter(|o| o.exists()) {
        return Err(Error::Exists {
            path: output.to_path_buf(),
        }
        .into());
    }
    let n_tokens = choice.map_or(Ok(Vec::new()), |choice| count(args, choice))?;
    let room = args.room();
    if room.remakes_inputs {
        check_remaking(model, recipe)?;
    }
    let memory = plan_memory(model, recipe, &n_tokens, !room.remakes_inputs);
    let memory = memory.within(room.memory_bytes);
    let disk = plan_disk(model, recipe);
    let shared = shared_modules(model, recipe);
    let tokens: usize = n_tokens.iter().sum();
    let n_samples = choice.map_or(0, |choice| choice.n_samples);
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "quantize --dry-run",
        "n_modules": modules.len(),
        "bits": recipe.bits(),
        "n_modules_with_shared_bits": shared,
        "n_samples": n_samples,
        "n_sequences": n_tokens.len(),
        "n_tokens": tokens,
        "memory": memory,
        "peak_memory_bytes": memory.total(),
        "disk_bytes": disk.tensors,
        "progress_bytes": disk.progress,
    });
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let mut text = format!(
        "{} modules, {n_samples} samples, {tokens} tokens\nmemory {:>8.0} MB at most\n",
        modules.len(),
        mb(memory.total())
    );
    text += &shared_text(recipe, shared);
    if memory.streams_on_disk > 0 {
        text += &format!(
            "disk   {:>8.1} MB of hidden states while at work\n",
            mb(memory.streams_on_disk)
        );
    }
    text += &format!(
        "disk   {:>8.1} MB of tensors, {:.1} MB of progress while at work\n",
        mb(disk.tensors),
        mb(disk.progress)
    );
    Ok(Done::new(json, text))
}

#[cfg(test)]
mod tests {
    use super::command;

    #[test]
    fn the_command_tells_names_and_not_where_folders_lie() {
        let args = ["quantize", "/home/me/a model", "--set", "x=it's", "out/3"];
        assert_eq!(
            command(&args.map(Into::into)),
            "vlmq quantize 'a model' --set 'x=it'\\''s' out/3"
        );
    }
}
