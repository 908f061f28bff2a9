//! Samples on their way from files to the first layer.

use crate::calibration::{self, CalibrationSample, CalibrationSet};
use crate::dataset::{Sample, SampleSet};
use crate::distributed::{Alone, Communicator};
use crate::engine::Engine;
use crate::families::open_processor;
use crate::hidden_states::Store;
use crate::memory::plan_memory_among;
use crate::model::ModelSource;
use crate::pipeline::Observer;
use crate::recipe::Recipe;
use crate::report::RanksReport;
use crate::shards::Shards;
use crate::{Error, Result};
use std::path::Path;

/// Which samples to calibrate on.
#[derive(Clone, Debug)]
pub struct SampleChoice {
    /// All there are.
    pub set: SampleSet,
    /// How many of them.
    pub n_samples: usize,
    /// Seed of the choice.
    pub seed: u64,
    /// Raw texts are read in pieces of at most so many tokens.
    pub max_tokens: usize,
}

/// What hidden states may take. How much it is changes no bit of what comes out.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Bytes of memory to stay below, as far as it can be: hidden states that do not fit go to disk.
    pub memory_bytes: u64,
    /// The same of a GPU's memory, where those that do not fit go to memory; all that is free if
    /// absent.
    pub device_bytes: Option<u64>,
    /// Whether the inputs of `down_proj` are made again whenever they are wanted, rather than kept. Done in
    /// any case on a GPU whose memory has no room to keep them, where it can be done.
    pub remakes_inputs: bool,
}

impl Room {
    /// So many bytes of memory.
    pub fn of_memory(memory_bytes: u64) -> Self {
        Self {
            memory_bytes,
            device_bytes: None,
            remakes_inputs: false,
        }
    }
}

/// Who takes part in a run, and in how many shards samples are summed up.
#[derive(Clone, Copy)]
pub struct Division<'a> {
    /// The ranks.
    pub communicator: &'a dyn Communicator,
    /// At least one.
    pub n_shards: usize,
}

impl Division<'_> {
    /// One rank with one shard.
    pub fn none() -> Self {
        Self {
            communicator: &Alone,
            n_shards: 1,
        }
    }

    /// What the report says of it; nothing of a rank alone with one shard.
    pub(super) fn report(&self) -> Option<RanksReport> {
        let n_ranks = self.communicator.n_ranks();
        (n_ranks > 1 || self.n_shards > 1).then_some(RanksReport {
            n_ranks,
            n_shards: self.n_shards,
            bytes_exchanged: Vec::new(),
        })
    }
}

/// The samples of a run, ready for the first layer; none for a method without calibration. Of their
/// hidden states, those that do not fit into `memory_bytes` with the rest of the work go to a file
/// in `dir`.
///
/// # Errors
/// [`Error::Missing`] if the method needs samples and no choice is given; else as
/// [`calibration::prepare`].
pub fn load_samples(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    memory_bytes: u64,
    dir: &Path,
    observer: &dyn Observer,
) -> Result<CalibrationSet> {
    let room = (Room::of_memory(memory_bytes), dir);
    load_share(model, recipe, choice, Division::none(), room, observer)
}

/// As [`load_samples`], those of this rank's shards.
///
/// # Errors
/// As there.
pub fn load_share(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    division: Division<'_>,
    room: (Room, &Path),
    observer: &dyn Observer,
) -> Result<CalibrationSet> {
    let part = Part {
        rank: division.communicator.rank(),
        n_ranks: division.communicator.n_ranks(),
        n_shards: division.n_shards,
    };
    load_part(model, recipe, choice, part, room, observer)
}

/// Which shards are meant: those of a rank.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) rank: usize,
    pub(super) n_ranks: usize,
    pub(super) n_shards: usize,
}

/// As [`load_share`], whoever else there is.
pub(super) fn load_part(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    part: Part,
    (room, dir): (Room, &Path),
    observer: &dyn Observer,
) -> Result<CalibrationSet> {
    if !recipe.needs_calibration() {
        return Ok(CalibrationSet::none());
    }
    let choice = choice.ok_or_else(|| Error::Missing {
        what: "--calibration DATA".into(),
        place: format!("the arguments; {} needs samples", recipe.method.name()),
    })?;
    let processor = open_processor(model.checkpoint().dir())?;
    let chosen: Vec<&Sample> = choice.set.choose(choice.n_samples, choice.seed)?;
    if let Some(tuning) = recipe.tuning() {
        // All that scales will be tuned on must be there before the first layer.
        let all = tuning.choice(choice);
        all.set.choose(all.n_samples, all.seed)?;
    }
    let max_tokens = choice.max_tokens;
    let n_tokens = calibration::count_tokens(&processor, &chosen, max_tokens)?;
    let share = Share::of(chosen, &n_tokens, part);
    let store = store(model, recipe, &share.n_tokens(), part.n_ranks, (room, dir))?;
    let tower = model.load_tower()?;
    let tower = tower.as_ref();
    let set = calibration::prepare(
        model,
        tower,
        &processor,
        &share.samples,
        max_tokens,
        store,
        observer,
    )?;
    Ok(share.number(set))
}

/// Where hidden states of samples of these many tokens are kept, and whether all of them are.
fn store(
    model: &ModelSource,
    recipe: &Recipe,
    n_tokens: &[usize],
    n_ranks: usize,
    (room, dir): (Room, &Path),
) -> Result<Store> {
    if room.remakes_inputs {
        check_remaking(model, recipe)?;
    }
    let plan = |keeps| plan_memory_among(n_ranks, model, recipe, n_tokens, keeps);
    let engine = Engine::of(model.device())?;
    let on_device = |keeps| engine.state_bytes(model, keeps, room.device_bytes);
    let remakes = room.remakes_inputs
        || engine.is_gpu()
            && check_remaking(model, recipe).is_ok()
            && plan(true).streams > on_device(true)?;
    let in_memory = plan(!remakes).room(room.memory_bytes);
    let store = Store::new(in_memory, dir, model.device()).on_device(on_device(!remakes)?);
    Ok(match remakes {
        true => store.without_down_inputs(),
        false => store,
    })
}

/// Whether inputs of `down_proj` can be made again whenever they are wanted.
///
/// # Errors
/// [`Error::Unsupported`] naming what they are kept for.
pub fn check_remaking(model: &ModelSource, recipe: &Recipe) -> Result<()> {
    let what = match model.decoder().experts {
        Some(_) => "a mixture of experts, whose experts see tokens of their own",
        None if recipe.method.is_scaled() => "a search for scales (awq, mbq)",
        None => return Ok(()),
    };
    Err(Error::Unsupported {
        what: format!("making inputs again (--remake-inputs) for {what}; leave it out"),
    })
}

/// What a rank reads: all samples of which a sequence is in one of its shards.
struct Share<'a> {
    samples: Vec<&'a Sample>,
    /// Places of their sequences among all of the run, and whether this rank has them: of a long
    /// text another may have some.
    sequences: Vec<(usize, bool)>,
    shards: Shards,
}

impl<'a> Share<'a> {
    /// `n_tokens` are those of each sequence of each sample.
    fn of(samples: Vec<&'a Sample>, n_tokens: &[Vec<usize>], part: Part) -> Self {
        let shards = Shards::cut(n_tokens.concat(), part.n_shards);
        let Part { rank, n_ranks, .. } = part;
        let mut share = Self {
            samples: Vec::new(),
            sequences: Vec::new(),
            shards,
        };
        let mut first = 0;
        for (sample, sequences) in samples.into_iter().zip(n_tokens) {
            let places = first..first + sequences.len();
            first = places.end;
            let own = places.map(|i| (i, share.shards.is_of_rank(i, rank, n_ranks)));
            let own: Vec<(usize, bool)> = own.collect();
            if own.iter().any(|(_, is_own)| *is_own) {
                share.samples.push(sample);
                share.sequences.extend(own);
            }
        }
        share
    }

    /// Tokens of each sequence of this rank.
    fn n_tokens(&self) -> Vec<usize> {
        let own = self.sequences.iter().filter(|(_, is_own)| *is_own);
        own.map(|(i, _)| self.shards.n_tokens()[*i]).collect()
    }

    /// What was read, each sequence with its place, and those of other ranks left out.
    fn number(self, set: CalibrationSet) -> CalibrationSet {
        let own = set.samples.into_iter().zip(self.sequences);
        let own = own.filter(|(_, (_, is_own))| *is_own);
        let samples = own.map(|(sample, (index, _))| CalibrationSample { index, ..sample });
        CalibrationSet {
            samples: samples.collect(),
            shards: self.shards,
            ..set
        }
    }
}
