//! What the ranks of a run must agree on before they begin.

use crate::dataset::Sample;
use crate::distributed::Communicator;
use crate::engine::Engine;
use crate::export::ModulePlan;
use crate::model::ModelSource;
use crate::recipe::Recipe;
use crate::run::{SampleChoice, settings_digest};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What decides what a rank does, in digests.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Agreement {
    version: String,
    settings: String,
    engine: String,
    model: String,
    samples: String,
}

/// Makes sure that all ranks were started alike.
///
/// # Errors
/// [`Error::Rank`] naming the first rank that differs from rank 0, and in what; [`Error::Io`].
pub(super) fn agree(
    communicator: &dyn Communicator,
    model: &ModelSource,
    recipe: &Recipe,
    plan: &[ModulePlan],
    choice: Option<&SampleChoice>,
) -> Result<()> {
    if communicator.is_alone() {
        return Ok(());
    }
    let own = Agreement {
        version: env!("CARGO_PKG_VERSION").into(),
        settings: settings_digest(recipe, plan),
        engine: Engine::of(model.device())?.kind(),
        model: model_digest(model)?,
        samples: match choice {
            Some(choice) => samples_digest(choice)?,
            None => String::new(),
        },
    };
    let all = communicator.all_gather_value(&own)?;
    for (rank, other) in all.iter().enumerate().skip(1) {
        let parts = [
            (&other.version, &all[0].version, "version of vlmq"),
            (&other.settings, &all[0].settings, "settings"),
            (&other.engine, &all[0].engine, "kind of device"),
            (&other.model, &all[0].model, "model"),
            (&other.samples, &all[0].samples, "samples"),
        ];
        if let Some((.., what)) = parts.into_iter().find(|(own, first, _)| own != first) {
            return Err(Error::Rank {
                rank,
                why: format!("it was started with another {what} than rank 0"),
            });
        }
    }
    Ok(())
}

/// Of what the model is, and of the weights of its first layer.
fn model_digest(model: &ModelSource) -> Result<String> {
    let checkpoint = model.checkpoint();
    let names = checkpoint.names().map(str::to_owned);
    let config = checkpoint.config().to_string();
    let first = model.layer_digest(0)?;
    Ok(digest(names.chain([config, first])))
}

/// Of where the chosen samples come from. What is in them, their own digest tells later.
pub(super) fn samples_digest(choice: &SampleChoice) -> Result<String> {
    let chosen: Vec<&Sample> = choice.set.choose(choice.n_samples, choice.seed)?;
    let ids = chosen.into_iter().map(|sample| sample.id.clone());
    Ok(digest(ids))
}

fn digest(parts: impl IntoIterator<Item = String>) -> String {
    let mut digest = blake3::Hasher::new();
    for part in parts {
        digest.update(&(part.len() as u64).to_le_bytes());
        digest.update(part.as_bytes());
    }
    digest.finalize().to_string()
}
