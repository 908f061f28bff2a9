//! `vlmq merge`

use super::{Done, SCHEMA};
use crate::statistics::folder::merge_folders;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Folders that `vlmq calibrate` or `vlmq merge` made, of other shards each
    #[arg(value_name = "DIR", required = true)]
    folders: Vec<PathBuf>,
    /// Folder of statistics to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let missing = merge_folders(&args.folders, &args.output)?;
    let missing: Vec<usize> = missing.into_iter().map(|shard| shard + 1).collect();
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "merge",
        "output": args.output,
        "missing_shards": missing,
    });
    let mut text = format!("wrote {}\n", args.output.display());
    if !missing.is_empty() {
        text = format!("shards still missing: {missing:?}\n{text}");
    }
    Ok(Done::new(json, text))
}
