//! How fast a model answers: `generation_speed MODEL IMAGE N_PROMPTS N_TOKENS [THREADS]` answers as
//! many prompts about one image at once, with exactly so many tokens each, and prints one line of
//! JSON with the seconds of reading the prompts, of everything, and tokens a second after the first.
//! `benches/generation.py` runs it beside transformers.

use candle_core::Device;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use vlmq::checkpoint::Checkpoint;
use vlmq::dataset::ImageSource;
use vlmq::families::{open_model, open_processor};
use vlmq::model::LoadedModel;
use vlmq::model::generation::Request;
use vlmq::processor::{ContentPart, Message, Role};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, picture, n_prompts, n_tokens, rest @ ..] = &args[..] else {
        anyhow::bail!("usage: generation_speed MODEL IMAGE N_PROMPTS N_TOKENS [THREADS]");
    };
    let (n_prompts, n_tokens): (usize, usize) = (n_prompts.parse()?, n_tokens.parse()?);
    if let Some(threads) = rest.first() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?);
        pool.build_global()?;
    }
    let folder = Path::new(folder);
    let processor = open_processor(folder)?;
    let model = open_model(Checkpoint::open(folder)?, Device::Cpu)?;
    let model = LoadedModel::load(model)?;
    let picture = ImageSource::File(picture.into()).load()?;
    let image = Arc::new(processor.vision_input(&picture, 1)?);
    let text = ContentPart::Text("Describe this image in every detail.".into());
    let message = Message {
        role: Role::User,
        content: vec![ContentPart::Image, text],
    };
    let input = processor.encode_prompt(&[message], std::slice::from_ref(&image))?;
    let features = model.image_features(&image)?;
    let start = model.nothing();
    let seconds = |n_tokens: usize| -> anyhow::Result<f64> {
        let request = |_| Request {
            prefix: &start,
            input: &input,
            features: vec![features.clone()],
            max_new_tokens: n_tokens,
            first_ids: Vec::new(),
        };
        let requests: Vec<Request> = (0..n_prompts).map(request).collect();
        let begin = Instant::now();
        // Without end tokens every answer has its full length.
        model.generate(&requests, &[], &|_| Ok(()))?;
        Ok(begin.elapsed().as_secs_f64())
    };
    seconds(2)?;
    let (first, all) = (seconds(1)?, seconds(n_tokens)?);
    let rate = (n_prompts * (n_tokens - 1)) as f64 / (all - first);
    println!(
        "{{\"n_prompt_tokens\": {}, \"first_token_seconds\": {first}, \"seconds\": {all}, \
         \"tokens_per_second\": {rate}}}",
        input.input_ids.len()
    );
    Ok(())
}
