//! Importance factors: how much each token's error in each linear matters to its layer.
//!
//! g_n is a norm over channels of the gradient at token n ([`backward`]); the token weight of the
//! Hessian is ω_n = (g_n / mean g)^p. p = 1 and p = 2 are the paper's first and second version;
//! both minimise an upper bound of the squared first-order change of the loss.
//!
//! **First layer.** Both streams start from the same embeddings, so the first layer's loss and all
//! its gradients are exactly zero, and ω would be 0/0. Such a layer (and any other whose residual
//! vanishes) gets uniform weights, which is the plain Hessian; the report says where. A weight of
//! zero for every token never reaches a solver.
//!
//! The loss may also be the one at the end of the model ([`end_loss`]), which vanishes nowhere.
//!
//! Source: arXiv:2508.03351 §3.2, eqs. of the importance factor; the first-layer rule is ours.

pub mod backward;
pub mod end_loss;
pub mod walk;
mod weights;

pub use weights::{
    ImportanceLoss, ImportanceSettings, LayerImportance, SampleFactors, TokenNorm, Uniform,
};

#[cfg(test)]
mod tests;
