//! From a weight and the statistics of its inputs to codes and scales.
//!
//! W `[out, in]` is the weight, H `[in, in]` the Hessian of its inputs, R the unit upper triangular
//! factor of H = R D Rᵀ, Q the weight on its grid. Every solver is a function of numbers only:
//! - [`rtn()`] rounds to nearest;
//! - [`gptq()`] rounds column after column and lets the later columns make up for each error; with
//!   [`SolverSettings::alpha`] it also corrects the drift of its inputs ([`Target`]), and with
//!   [`SolverSettings::sweeps`] it goes over codes and scales again (`refine.rs`).
//!
//! [`scale`] and [`search_limits`] are what AWQ searches for before it rounds to nearest.
//!
//! [`mod@reference`] is the same method written from its definition, which [`gptq()`] is tested
//! against. Token weights (VLMQ) live in the statistics alone; no solver knows of them.

mod drift;
mod factor;
mod gain;
pub mod gptq;
mod grid;
mod limit;
mod loss;
pub mod reference;
mod refine;
mod rows;
mod rtn;
pub mod scale;
mod symmetric;
mod target;
mod triangle;

pub use factor::Factor;
pub(crate) use factor::{
    Columns, Damped, HandedTriangle, Unfactored, check_moments, column_weights, pivot_noise,
};
pub use gptq::gptq;
pub(crate) use grid::check_scales;
pub use limit::{limited, search_limits};
pub use loss::layer_loss;
pub(crate) use loss::quantization_loss;
pub use rows::ROW_UNIT;
pub use rtn::rtn;
pub(crate) use target::row_alpha;

use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Matrix, QuantizedWeight, Result};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// How the range of a group is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clip {
    /// From the least to the greatest weight.
    #[default]
    None,
    /// The range shrunk by the factor among 1, 0.99 … 0.21 that minimises Σ|error|^2.4; of equal
    /// ones the widest. Costs about 80 roundings of the weight.
    Mse,
    /// The scale and zero point that minimise Σ D_q^p · |error|^r, D being the pivots of H: what an error
    /// adds to the loss once the later columns have made up for it; p is
    /// [`SolverSettings::clip_power`], r [`SolverSettings::clip_norm`]. Without statistics every column
    /// counts alike. Costs about 45 roundings of the weight. Ours.
    Weighted,
}

/// The power of an error that [`Clip::Weighted`] sums up.
///
/// What is rounded is not the weight but the weight moved by the errors of earlier columns, which
/// spreads further: the square cuts the range too short for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClipNorm {
    /// 2.
    #[serde(rename = "2")]
    Square,
    /// 2.5.
    #[serde(rename = "2.5")]
    Between,
    /// 3.
    #[default]
    #[serde(rename = "3")]
    Cube,
}

/// How the drift of the inputs is corrected, where [`SolverSettings::alpha`] is positive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Each column hands its share on when it is rounded (GPTAQ).
    #[default]
    Pull,
    /// What is rounded is the weight that least squares ask for. The minimiser of the same
    /// objective without GPTAQ's approximation.
    LeastSquares,
    /// The same, and linears whose output is added to the residual stream also give what it lacks:
    /// ‖(U' + Q U) − (F' + W F)‖², U' and F' being the streams that it is added to. Ours.
    ResidualStream,
    /// The same as least squares but for the first column in solving order, which is rounded from where
    /// it alone would make up for the drift; the others then do for what is left (Qronos,
    /// arXiv:2505.11695).
    Qronos,
}

/// What [`SolverSettings::dampening_frac`] is a fraction of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DampeningUnit {
    /// The mean of H's nonzero diagonal entries (GPTQ).
    #[default]
    MeanDiagonal,
    /// H's largest eigenvalue, found by power iteration (Qronos).
    LargestEigenvalue,
}

/// Settings of [`gptq()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SolverSettings {
    /// Added to the diagonal of H, as a fraction of [`SolverSettings::dampening_unit`].
    pub dampening_frac: f64,
    /// What that is a fraction of.
    pub dampening_unit: DampeningUnit,
    /// Fractions tried in turn when H is not positive definite with the one before.
    pub dampening_ladder: Vec<f64>,
    /// Columns in descending order of diag(H), with grids fitted beforehand on the original weight
    /// (static groups), so that no permutation is ever stored.
    pub act_order: bool,
    /// Share of the drift between the streams that is corrected, 0 to 1: 0 is GPTQ, 0.25 is what
    /// GPTAQ's authors use. Needs statistics with cross moments.
    pub alpha: f32,
    /// Whether α of each row is found on held-out samples instead, if [`Factor::with_part`] knows of
    /// any. Not with [`Target::Pull`].
    pub held_out_alpha: bool,
    /// How it is corrected.
    pub target: Target,
    /// How ranges are chosen.
    pub clip: Clip,
    /// p of [`Clip::Weighted`], 0 (all columns alike) to 1 (as the loss counts them). Below 1 single
    /// massive channels no longer leave the rest of their group uncounted.
    pub clip_power: f32,
    /// r of [`Clip::Weighted`]; where no statistics are, its default.
    pub clip_norm: ClipNorm,
    /// Sweeps of coordinate descent over the codes after all columns are rounded. Needs α = 0 or
    /// another target than [`Target::Pull`].
    pub sweeps: usize,
    /// Whether sweeps also move the scales.
    pub refit_scales: bool,
    /// Whether rows are brought back to unit gain at the end.
    pub unit_gain: bool,
    /// Columns solved before the columns after them are updated; a matter of speed only.
    pub col_block: usize,
}

impl Default for SolverSettings {
    fn default() -> Self {
        Self {
            dampening_frac: 0.01,
            dampening_unit: DampeningUnit::MeanDiagonal,
            dampening_ladder: vec![0.02, 0.04, 0.08, 0.16, 0.32, 0.64],
            act_order: true,
            alpha: 0.0,
            held_out_alpha: false,
            target: Target::Pull,
            clip: Clip::None,
            clip_power: 0.5,
            clip_norm: ClipNorm::Cube,
            sweeps: 0,
            refit_scales: true,
            unit_gain: false,
            col_block: 128,
        }
    }
}

impl SolverSettings {
    /// # Errors
    /// [`Error::Invalid`] naming the first setting outside its range.
    pub fn check(&self) -> Result<()> {
        let invalid = |what: &str, why: String| {
            Err(Error::Invalid {
                what: what.into(),
                why,
            })
        };
        let is_bad = |frac: &&f64| !(frac.is_finite() && **frac >= 0.0);
        let mut fractions = std::iter::once(&self.dampening_frac).chain(&self.dampening_ladder);
        if let Some(bad) = fractions.find(is_bad) {
            return invalid(
                "dampening_frac",
                format!("{bad} given, a finite number >= 0 expected"),
            );
        }
        if !(0.0..=1.0).contains(&self.alpha) {
            return invalid("alpha", format!("{} given, 0 to 1 expected", self.alpha));
        }
        if !(0.0..=1.0).contains(&self.clip_power) {
            let why = format!("{} given, 0 to 1 expected", self.clip_power);
            return invalid("clip_power", why);
        }
        if self.sweeps > 0 && self.alpha > 0.0 && self.target == Target::Pull {
            let why = format!(
                "{} given with alpha = {} and target = pull, which has no objective to descend; \
                 set target=least_squares",
                self.sweeps, self.alpha
            );
            return invalid("sweeps", why);
        }
        if self.held_out_alpha && matches!(self.target, Target::Pull | Target::Qronos) {
            let why = "found for target=least_squares and target=residual_stream only".into();
            return invalid("alpha=held_out", why);
        }
        if self.col_block == 0 {
            return invalid("col_block", "0 given, at least 1 expected".into());
        }
        Ok(())
    }

    /// Whether grids of this number format can be kept: those of super-blocks are fitted
    /// beforehand, and nothing may move a scale of theirs by itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the setting that would have to be otherwise; as
    /// [`SolverSettings::check`].
    pub fn check_scheme(&self, scheme: Scheme) -> Result<()> {
        self.check()?;
        if scheme.scale_dtype() != ScaleDtype::Superblock {
            return Ok(());
        }
        let found = [
            (!self.act_order, "act_order=false"),
            (self.sweeps > 0 && self.refit_scales, "refit_scales=true"),
            (self.unit_gain, "unit_gain=true"),
        ];
        match found.iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, setting)) => Err(Error::Invalid {
                what: "scale_dtype superblock".into(),
                why: format!(
                    "{setting} given; act_order=true, refit_scales=false and unit_gain=false \
                     expected"
                ),
            }),
            None => Ok(()),
        }
    }
}

/// What [`gptq()`] found, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// The quantized weight, columns in their original order.
    pub weight: QuantizedWeight,
    /// tr((W − Q) H (W − Q)ᵀ) with H as accumulated, undamped: squared output error summed over
    /// rows and weighted tokens, divided by nothing. See [`layer_loss`].
    pub loss: f64,
    /// tr(W H Wᵀ), the squared output that the loss is to be compared with.
    pub energy: f64,
    /// α, or the mean of the rows'.
    pub alpha: f32,
    /// The damping that worked.
    pub dampening_frac: f64,
    /// Dampings that failed before it, in order.
    pub dampening_steps: Vec<f64>,
    /// Columns that no token of positive weight excited; they were rounded to nearest.
    pub n_dead_columns: usize,
}

fn check_weight(module: &str, w: &Matrix) -> Result<()> {
    let count = w.count_not_finite();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NotFinite {
        module: module.to_owned(),
        stage: "weights".into(),
        count,
    })
}
