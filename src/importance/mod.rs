//! Importance factors: how much each token's error in each linear matters to its layer.
//!
//! What a token weighs is put together of choices that can be made one by one
//! ([`ImportanceSettings`]), of which the paper's are the default:
//!
//! ```text
//!  source   drift | rounding | curvature ─► loss: linear | attention | layer ─► norm over channels
//!           attention | random ──────────────────────────────────────────────────────┐   │
//!                                                                                    ▼   ▼
//!  ω = (g / mean g)^p  ◄─ floor ◄─ granularity: token | modality ◄─ quantile ◄─ modules ◄─ g
//!  └─► mixed with equal weights up to an effective sample size
//! ```
//! By default g_n is a norm over channels of the gradient at token n ([`backward`]). p = 1 and p = 2
//! are the paper's first and second version; both minimise an upper bound of the squared first-order
//! change of the loss.
//!
//! The loss may also be the one at the end of the model ([`end_loss`]), which vanishes nowhere.
//!
//! **First layer.** Both streams start from the same embeddings, so the first layer's drift and all
//! gradients of it are exactly zero, and ω would be 0/0. Such a layer (and any other whose residual
//! vanishes) gets uniform weights, which is the plain Hessian; the report says where. Other sources
//! than the drift weigh the first layer's tokens too. A weight of zero for every token never
//! reaches a solver.
//!
//! Source: arXiv:2508.03351 §3.2, eqs. of the importance factor; the first-layer rule is ours, and
//! so are rounding, curvature and the safeguards.

mod attention_scores;
pub mod backward;
mod draw;
pub mod end_loss;
mod exchange;
mod factors;
mod linear_loss;
mod modality;
mod safeguards;
mod settings;
pub mod sides;
pub mod walk;
mod weights;

pub(crate) use exchange::gather_factors;
pub use factors::{FullPass, SampleFactors, SampleInLayer};
pub use modality::ModalityRatios;
pub use safeguards::{Safeguarded, Safeguards};
pub use settings::{
    Granularity, ImportanceLoss, ImportanceModules, ImportanceSettings, ImportanceSource, TokenNorm,
};
pub use weights::{LayerImportance, TokenWeights, Uniform};

#[cfg(test)]
mod tests;
