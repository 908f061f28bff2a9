//! Scales tuned by distillation: after all layers are quantized the codes stay what they are, and
//! the scales are moved so that the whole model's answers come nearer to the original's.
//!
//! L = mean KL(original ‖ quantized) over the places whose next token is one of an answer (of all
//! but images with [`TuningLoss::All`]), its gradient by the closed-form backward pass through all
//! layers ([`crate::importance::walk`]). With w = (code − zero_point)·s the gradient of a scale is
//! Σ_c∈group dW·(code − zero_point), dW = Pᵀ·u; it is Adam that moves θ in s = s₀·exp(θ), so a step
//! is a relative change. Every pass goes through the scales as they are stored (rounded to bf16 or
//! f16), the masters in f32 behind them.
//!
//! Few samples are learnt by heart: answers are short, and there are many scales. More than the
//! layers were solved with can be had for this alone ([`TuningSettings::samples`]).
//!
//! One in eight samples takes no part; the scales are kept that were best on these, the untuned
//! ones included. All sums are in the order of samples: same scales for any number of threads.
//!
//! Cost: a step walks [`TuningSettings::batch`] samples twice forward and once back, about what
//! four to five forwards of them take. Memory: all codes (a byte per weight), five f32 per scale,
//! the original's last states at the places asked for, and what [`walk`] says.
//!
//! Source: arXiv:2407.11062 (EfficientQAT) §3.3, which tunes scales end to end by the next token;
//! the distillation, the parametrisation and the held-out choice are ours.

mod distance;
mod student;

use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::importance::end_loss::{Loss, rows_at, spread};
use crate::importance::walk::{self, Sequence, Walk, answer_places, together};
use crate::model::{Head, ModelSource, Module};
use crate::pipeline::Observer;
use crate::processor::TokenClass;
use crate::run::SampleChoice;
use crate::{Error, QuantizedWeight, Result};
use candle_core::Tensor;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::time::Instant;
use student::Student;

/// One sample of so many takes no part in tuning, and decides what is kept.
const HELD_OUT: usize = 8;

/// How often the held-out samples are looked at on the way.
const CHECKS: usize = 8;

/// The share of the rate that the last step has.
const LAST_RATE: f64 = 0.1;

/// Which places of a sample the models are compared at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TuningLoss {
    /// Those whose next token is of an answer or of raw text.
    Answer,
    /// All whose next token is not of an image.
    All,
}

/// How scales are tuned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuningSettings {
    /// Steps of Adam; none leaves the scales as they are.
    pub steps: usize,
    /// Samples per step.
    pub batch: usize,
    /// Relative change of a scale in the first step; falls along a half cosine.
    pub rate: f64,
    /// Where the models are compared.
    pub loss: TuningLoss,
    /// Samples, where they are to be more than the layers were solved with.
    pub samples: Option<usize>,
}

impl Default for TuningSettings {
    fn default() -> Self {
        Self {
            steps: 0,
            batch: 16,
            rate: 0.0007,
            loss: TuningLoss::Answer,
            samples: None,
        }
    }
}

impl TuningSettings {
    /// The samples to tune on: those of a run, and more of them by the same seed.
    pub fn choice(&self, run: &SampleChoice) -> SampleChoice {
        SampleChoice {
            n_samples: self.samples.unwrap_or(run.n_samples),
            ..run.clone()
        }
    }

    /// The rate of a step.
    fn rate_at(&self, step: usize) -> f64 {
        let along = step as f64 / self.steps.max(1) as f64;
        let fall = 0.5 * (1.0 + (std::f64::consts::PI * along).cos());
        self.rate * (LAST_RATE + (1.0 - LAST_RATE) * fall)
    }
}

impl TuningLoss {
    fn places(self, classes: &[TokenClass]) -> Vec<u32> {
        match self {
            Self::Answer => answer_places(classes),
            Self::All => {
                let next = classes.iter().skip(1).enumerate();
                let asked = next.filter(|(_, class)| **class != TokenClass::Vision);
                asked.map(|(place, _)| place as u32).collect()
            }
        }
    }
}

/// What tuning did. Losses are mean KL(original ‖ quantized) per place, in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuningReport {
    /// Steps that were made.
    pub steps: usize,
    /// The step after which the scales were that are kept; 0: they are the untuned ones.
    pub best_step: usize,
    /// Samples that scales were tuned on.
    pub n_samples: usize,
    /// Samples that decided what is kept.
    pub n_held_out: usize,
    /// On as many of the former as the latter are, before.
    pub loss_before: f64,
    /// On these of the former, with the scales that are kept.
    pub loss_after: f64,
    /// On the latter, before.
    pub held_out_before: f64,
    /// On the latter, with the scales that are kept.
    pub held_out_after: f64,
    /// Wall time.
    pub seconds: f64,
}

/// Weights with other scales than before, and what it took.
#[derive(Debug)]
pub struct Tuned {
    /// In the order in which they were given.
    pub weights: Vec<(Module, QuantizedWeight)>,
    /// What tuning did.
    pub report: TuningReport,
}

/// Tunes the scales of `weights`, which are those of all quantized linears of `model`; all others
/// are taken as they are in it.
///
/// # Errors
/// [`Error::Invalid`] if fewer than two samples have places to compare; [`Error::NotFinite`] if a
/// loss is no number before the first step; [`Error::Interrupted`] if the observer says so; the
/// model's.
/// Source: see the module; differs from EfficientQAT in loss, parametrisation and choice.
pub fn tune(
    model: &ModelSource,
    set: &CalibrationSet,
    weights: Vec<(Module, QuantizedWeight)>,
    settings: TuningSettings,
    observer: &dyn Observer,
) -> Result<Tuned> {
    let began = Instant::now();
    let comparison = Comparison::new(model, set, settings.loss, observer)?;
    let (train, held_out) = comparison.parts()?;
    let mut student = Student::new(model, weights);
    let judged = &train[..train.len().min(held_out.len())];
    let before = [judged, &held_out].map(|part| comparison.loss(&student, part));
    let [loss_before, held_out_before] = numbers(before)?;
    let mut best = (held_out_before, 0, student.thetas());
    let every = settings.steps.div_ceil(CHECKS).max(1);
    let mut lots = Lots::new(train.clone());
    for step in 1..=settings.steps {
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let gradients = comparison.gradients(&student, &lots.next(settings.batch))?;
        student.step(&gradients, settings.rate_at(step - 1))?;
        if step % every == 0 || step == settings.steps {
            let loss = comparison.loss(&student, &held_out)?;
            tracing::info!(step, loss, "held-out loss of tuning");
            // NaN compares false: it is never the best.
            if loss < best.0 {
                best = (loss, step, student.thetas());
            }
        }
    }
    let (held_out_after, best_step, thetas) = best;
    student.restore(&thetas)?;
    let loss_after = match best_step {
        0 => loss_before,
        _ => comparison.loss(&student, judged)?,
    };
    Ok(Tuned {
        weights: student.into_weights(),
        report: TuningReport {
            steps: settings.steps,
            best_step,
            n_samples: train.len(),
            n_held_out: held_out.len(),
            loss_before,
            loss_after,
            held_out_before,
            held_out_after,
            seconds: began.elapsed().as_secs_f64(),
        },
    })
}

fn numbers<const N: usize>(losses: [Result<f64>; N]) -> Result<[f64; N]> {
    let mut found = [0.0; N];
    for (place, loss) in found.iter_mut().zip(losses) {
        *place = loss?;
        if !place.is_finite() {
            return Err(Error::NotFinite {
                module: "head".into(),
                stage: "loss of tuning".into(),
                count: 1,
            });
        }
    }
    Ok(found)
}

/// The samples with what the original, the teacher, makes of them.
struct Comparison<'a> {
    model: &'a ModelSource,
    set: &'a CalibrationSet,
    head: Head,
    lessons: Vec<Lesson<'a>>,
    observer: &'a dyn Observer,
}

struct Lesson<'a> {
    sample: &'a CalibrationSample,
    /// Where the models are compared.
    places: Vec<u32>,
    /// The original's last states there, `[n_places, hidden]`.
    teacher: Tensor,
}

impl<'a> Comparison<'a> {
    /// Takes the samples through the original.
    fn new(
        model: &'a ModelSource,
        set: &'a CalibrationSet,
        loss: TuningLoss,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let asked = set.samples.iter();
        let asked = asked.map(|sample| (sample, loss.places(&sample.classes)));
        let asked: Vec<_> = asked.filter(|(_, places)| !places.is_empty()).collect();
        let n_tokens: Vec<usize> = asked.iter().map(|(s, _)| s.classes.len()).collect();
        let mut lessons = Vec::new();
        for run in together(model.decoder(), &n_tokens) {
            if observer.is_cancelled() {
                return Err(Error::Interrupted);
            }
            let asked = &asked[run];
            let sequences = asked.iter().map(|(sample, _)| Sequence::read(set, sample));
            let sequences = sequences.collect::<Result<Vec<_>>>()?;
            let outputs = walk::outputs(model, &sequences)?;
            for ((sample, places), x) in asked.iter().zip(outputs) {
                lessons.push(Lesson {
                    sample,
                    places: places.clone(),
                    teacher: rows_at(&x, places)?,
                });
            }
        }
        Ok(Self {
            model,
            set,
            head: model.load_head()?,
            lessons,
            observer,
        })
    }

    /// Those to tune on and those held out.
    fn parts(&self) -> Result<(Vec<usize>, Vec<usize>)> {
        let n = self.lessons.len();
        if n < 2 {
            return Err(Error::Invalid {
                what: "calibration".into(),
                why: format!("{n} samples with answers or raw text, tuning needs at least 2"),
            });
        }
        let each = HELD_OUT.min(n);
        Ok((0..n).partition(|index| index % each != each - 1))
    }

    fn sequences(&self, part: &[usize]) -> Result<Vec<Sequence>> {
        let samples = part.iter().map(|&index| self.lessons[index].sample);
        samples.map(|s| Sequence::read(self.set, s)).collect()
    }

    /// Parts of `part` that are walked together.
    fn runs<'b>(&self, part: &'b [usize]) -> impl Iterator<Item = &'b [usize]> {
        let n_tokens = part.iter().map(|&i| self.lessons[i].sample.classes.len());
        let runs = together(self.model.decoder(), &n_tokens.collect::<Vec<_>>());
        runs.into_iter().map(|run| &part[run])
    }

    fn n_places(&self, part: &[usize]) -> usize {
        part.iter().map(|&i| self.lessons[i].places.len()).sum()
    }

    /// Mean KL per place of some lessons.
    fn loss(&self, student: &Student, part: &[usize]) -> Result<f64> {
        let mut total = 0.0;
        for run in self.runs(part) {
            if self.observer.is_cancelled() {
                return Err(Error::Interrupted);
            }
            let outputs = walk::outputs(student, &self.sequences(run)?)?;
            for (&index, x) in run.iter().zip(&outputs) {
                total += self.divergence(index, x)?.sum;
            }
        }
        Ok(total / self.n_places(part).max(1) as f64)
    }

    /// KL of a lesson from the student's last states `x`, with the gradient at its places.
    fn divergence(&self, index: usize, x: &Tensor) -> Result<Loss> {
        let lesson = &self.lessons[index];
        let student = rows_at(x, &lesson.places)?;
        distance::divergence(&self.head, &lesson.teacher, &student)
    }

    /// The gradients of the mean KL of some lessons with respect to all scales, in the order of
    /// [`Student::step`].
    fn gradients(&self, student: &Student, part: &[usize]) -> Result<Vec<Vec<f32>>> {
        let n_places = self.n_places(part).max(1) as f64;
        let mut sums: Vec<Vec<f32>> = student.zeros();
        for run in self.runs(part) {
            let sequences = self.sequences(run)?;
            let walk = Walk::forward(student, &sequences)?;
            let mut gradients = Vec::new();
            for (&index, x) in run.iter().zip(&walk.outputs) {
                let rows = (self.divergence(index, x)?.gradient / n_places)?;
                gradients.push(spread(x, &self.lessons[index].places, &rows)?);
            }
            let seen = walk.backward(gradients, |[layer_idx, _], pass, gradients| {
                student.scale_gradients(layer_idx, pass, gradients)
            })?;
            for (layer_idx, samples) in seen.iter().enumerate() {
                for own in samples {
                    student.add(layer_idx, own, &mut sums);
                }
            }
        }
        Ok(sums)
    }
}

/// Lessons in lots: every round in another order, which depends on nothing but their number.
struct Lots {
    all: Vec<usize>,
    left: Vec<usize>,
    rng: ChaCha8Rng,
}

impl Lots {
    fn new(all: Vec<usize>) -> Self {
        Self {
            all,
            left: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(0),
        }
    }

    /// The next `n` at most; a round that is at its end gives fewer.
    fn next(&mut self, n: usize) -> Vec<usize> {
        if self.left.is_empty() {
            self.left = self.all.clone();
            self.left.shuffle(&mut self.rng);
        }
        self.left.split_off(self.left.len().saturating_sub(n))
    }
}

#[cfg(test)]
mod tests;
