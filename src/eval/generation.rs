//! Answers of a model to many questions: prompts that show the same image are read once up to where
//! they differ, and many are continued at once, as many as their keys and values leave memory for.

use super::first_token::FirstToken;
use super::task::{self, EvalItem};
use crate::Result;
use crate::model::LoadedModel;
use crate::model::generation::{OnToken, Request};
use crate::model::loaded::Prefix;
use crate::processor::Processor;
use rayon::prelude::*;

/// Keys and values that are kept at a time, in bytes, unless the questions about one image take more.
const CACHE_BYTES: usize = 1 << 30;

/// Most answers that are written at a time: more make no step faster.
const MAX_SEQUENCES: usize = 64;

/// What a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenText {
    /// As it stands.
    pub text: String,
    /// Of multiple choice, the letter that is likeliest to come first.
    pub first_token: Option<FirstToken>,
}

/// The answers to `items` as text, in their order, each of at most as many tokens as its item says.
/// `on_token` hears after each token how many answers ended there, and ends the work by an error.
///
/// # Errors
/// The model's and the tokenizer's; `on_token`'s.
pub fn generate_answers(
    model: &LoadedModel,
    processor: &Processor,
    items: &[EvalItem],
    on_token: &OnToken,
) -> Result<Vec<WrittenText>> {
    let mut answers = Vec::with_capacity(items.len());
    for batch in batches(model, &task::groups(items)) {
        let prefixes: Vec<Prefix> = batch
            .par_iter()
            .map(|group| task::shared_prefix(model, group))
            .collect::<Result<_>>()?;
        let items_with_prefix: Vec<(&EvalItem, &Prefix)> = batch
            .iter()
            .zip(&prefixes)
            .flat_map(|(group, prefix)| group.iter().map(move |item| (item, prefix)))
            .collect();
        let requests: Vec<Request> = items_with_prefix
            .par_iter()
            .map(|(item, prefix)| request(model, item, prefix))
            .collect::<Result<_>>()?;
        let written = model.generate(&requests, processor.eos_ids(), on_token)?;
        for ((item, _), written) in items_with_prefix.iter().zip(written) {
            answers.push(WrittenText {
                text: processor.decode(&written.ids)?,
                first_token: FirstToken::of(&item.letters, &written.first_logits),
            });
        }
    }
    Ok(answers)
}

fn request<'a>(model: &LoadedModel, item: &'a EvalItem, prefix: &'a Prefix) -> Result<Request<'a>> {
    Ok(Request {
        prefix,
        input: &item.prompt,
        features: item.features(model)?,
        max_new_tokens: item.max_new_tokens,
        first_ids: item.letters.iter().map(|(_, id)| *id).collect(),
    })
}

/// Runs of groups that are answered together.
fn batches<'g, 'i>(model: &LoadedModel, groups: &'g [&'i [EvalItem]]) -> Vec<&'g [&'i [EvalItem]]> {
    let decoder = model.source().decoder();
    let token_bytes =
        2 * size_of::<f32>() * decoder.n_layers * decoder.n_kv_heads * decoder.head_dim;
    let cost = |group: &[EvalItem]| {
        // Most answers are short, however long they may be.
        let tokens = group.iter().map(|item| item.prompt.input_ids.len());
        [group.len(), 2 * token_bytes * tokens.sum::<usize>()]
    };
    let costs: Vec<[usize; 2]> = groups.iter().map(|group| cost(group)).collect();
    let mut start = 0;
    cuts(&costs, [MAX_SEQUENCES, CACHE_BYTES])
        .into_iter()
        .map(|end| {
            let batch = &groups[start..end];
            start = end;
            batch
        })
        .collect()
}

/// Where runs end none of whose summed costs is over its limit, single entries aside.
fn cuts(costs: &[[usize; 2]], limits: [usize; 2]) -> Vec<usize> {
    let (mut ends, mut sums) = (Vec::new(), [0usize; 2]);
    for (index, cost) in costs.iter().enumerate() {
        let more = [0, 1].map(|i| sums[i].saturating_add(cost[i]));
        let is_over = more[0] > limits[0] || more[1] > limits[1];
        if is_over && index > ends.last().copied().unwrap_or(0) {
            ends.push(index);
            sums = *cost;
        } else {
            sums = more;
        }
    }
    if !costs.is_empty() {
        ends.push(costs.len());
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::eval::{TaskItems, TaskRows, open_tasks};
    use crate::families::{open_model, open_processor};
    use candle_core::Device;
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Prompts of several images and lengths, some of which end before others.
    #[test]
    fn answers_are_the_same_one_by_one_and_together() {
        let testbed = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testbed"));
        let processor = open_processor(&testbed.join("model")).unwrap();
        let checkpoint = Checkpoint::open(&testbed.join("model")).unwrap();
        let model = open_model(checkpoint, Device::Cpu).unwrap();
        let model = LoadedModel::load(model).unwrap();
        let rows = TaskRows {
            skip: 0,
            limit: Some(9),
        };
        let tasks = open_tasks(&testbed.join("eval"), &processor, rows, 64).unwrap();
        let mut items = Vec::new();
        for task in tasks {
            if let TaskItems::Questions(questions) = task.items {
                items.extend(questions);
            }
        }
        let n_told = AtomicUsize::new(0);
        let tell = |n| {
            n_told.fetch_add(n, Ordering::Relaxed);
            Ok(())
        };
        let together = generate_answers(&model, &processor, &items, &tell).unwrap();
        assert_eq!(n_told.into_inner(), items.len());
        let lengths: BTreeSet<usize> = together.iter().map(|written| written.text.len()).collect();
        assert!(lengths.len() > 2, "{together:?}");
        for (item, expected) in items.iter().zip(together) {
            let one = std::slice::from_ref(item);
            let alone = generate_answers(&model, &processor, one, &|_| Ok(())).unwrap();
            assert_eq!(alone, [expected]);
        }
        items.truncate(2);
        items.iter_mut().for_each(|item| item.max_new_tokens = 0);
        let nothing = generate_answers(&model, &processor, &items, &|_| Ok(())).unwrap();
        assert!(nothing.iter().all(|written| written.text.is_empty()));
        assert_eq!(nothing.len(), 2);
    }

    #[test]
    fn runs_keep_to_both_limits_and_leave_nothing_out() {
        let costs = [[1, 5], [1, 5], [1, 1], [3, 1], [9, 9], [1, 1]];
        assert_eq!(cuts(&costs, [3, 10]), [2, 3, 4, 5, 6]);
        assert_eq!(cuts(&costs, [100, 100]), [6]);
        assert_eq!(cuts(&[[5, 5]], [1, 1]), [1]);
        assert_eq!(cuts(&[[5, 5], [5, 5]], [1, 1]), [1, 2]);
        assert!(cuts(&[], [1, 1]).is_empty());
    }
}
