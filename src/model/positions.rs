//! M-RoPE position ids: where each token stands in time, height and width.

use crate::model::rope::PositionIds;
use crate::{Error, Result};

/// The positions of a sample, and where the text after it continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Positions {
    /// Positions along the three axes.
    pub ids: PositionIds,
    /// Position of the first token that would be generated.
    pub next: u32,
}

/// Positions of `n_tokens` tokens that simply follow each other from `first` on, images or not.
pub fn text_positions(n_tokens: usize, first: u32) -> Positions {
    let next = first + n_tokens as u32;
    Positions {
        ids: std::array::from_fn(|_| (first..next).collect()),
        next,
    }
}

/// Positions of `input_ids`, whose runs of `image_token_id` are the images of `grids_thw` (patch
/// counts) in order. Text counts on by one; an image spreads over its merged grid from the
/// position it starts at, and text goes on after its longer side.
///
/// # Errors
/// [`Error::Shape`] if the image tokens do not add up to the images' merged patches.
/// Source: Qwen2-VL, arXiv:2409.12191 §2.1; transformers `get_rope_index`.
pub fn multimodal_positions(
    input_ids: &[u32],
    image_token_id: u32,
    grids_thw: &[[usize; 3]],
    merge_size: usize,
) -> Result<Positions> {
    let mut ids: PositionIds = Default::default();
    let mut next = 0u32;
    let mut grids = grids_thw.iter();
    let mut token = 0;
    while token < input_ids.len() {
        if input_ids[token] != image_token_id {
            ids.iter_mut().for_each(|axis| axis.push(next));
            next += 1;
            token += 1;
            continue;
        }
        let [t, h, w] = *grids
            .next()
            .ok_or_else(|| mismatch(input_ids, image_token_id, grids_thw, merge_size))?;
        let (h, w) = (h / merge_size, w / merge_size);
        let n_tokens = t * h * w;
        let run = input_ids[token..].iter().take(n_tokens);
        if n_tokens == 0 || run.filter(|&&id| id == image_token_id).count() != n_tokens {
            return Err(mismatch(input_ids, image_token_id, grids_thw, merge_size));
        }
        for i in 0..n_tokens {
            ids[0].push(next + (i / (h * w)) as u32);
            ids[1].push(next + (i / w % h) as u32);
            ids[2].push(next + (i % w) as u32);
        }
        next += h.max(w) as u32;
        token += n_tokens;
    }
    match grids.next() {
        Some(_) => Err(mismatch(input_ids, image_token_id, grids_thw, merge_size)),
        None => Ok(Positions { ids, next }),
    }
}

fn mismatch(
    input_ids: &[u32],
    image_token_id: u32,
    grids_thw: &[[usize; 3]],
    merge_size: usize,
) -> Error {
    let merged = |[t, h, w]: &[usize; 3]| t * (h / merge_size) * (w / merge_size);
    Error::Shape {
        module: "image tokens in the prompt".into(),
        expected: grids_thw.iter().map(merged).collect(),
        found: vec![input_ids.iter().filter(|&&id| id == image_token_id).count()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: u32 = 9;

    #[test]
    fn text_goes_on_after_the_longer_side_of_an_image() {
        let mut ids = vec![1, 2];
        ids.extend([IMAGE; 6]);
        ids.extend([3, 4]);
        let p = multimodal_positions(&ids, IMAGE, &[[1, 4, 6]], 2).unwrap();
        assert_eq!(p.ids[0], [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]);
        assert_eq!(p.ids[1], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]);
        assert_eq!(p.ids[2], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]);
        assert_eq!(p.next, 7);
    }

    #[test]
    fn image_tokens_must_match_the_images() {
        let ids = [1, IMAGE, IMAGE, 2];
        for grids in [
            &[][..],
            &[[1, 2, 2]],
            &[[1, 4, 4]],
            &[[1, 2, 2], [1, 2, 2], [1, 2, 2]],
        ] {
            assert!(matches!(
                multimodal_positions(&ids, IMAGE, grids, 2),
                Err(Error::Shape { .. })
            ));
        }
        assert!(multimodal_positions(&ids, IMAGE, &[[1, 2, 4]], 2).is_ok());
    }
}
