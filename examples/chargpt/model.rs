//! The network: nanoGPT's, with its names of parameters.

use anyhow::Result;
use tch::nn::{self, Init, ModuleT, Path};
use tch::{Kind, Tensor};

/// The sizes of the network.
#[derive(Clone, Copy)]
pub struct Config {
    /// The number of different characters.
    pub vocabulary: i64,
    /// The number of characters that the network sees.
    pub context: i64,
    pub layers: usize,
    pub heads: i64,
    pub width: i64,
    pub dropout: f64,
}

/// A transformer that gives the score of each next character: inputs of shape (N, T), scores of shape (N, T, vocabulary).
/// The embedding of the characters is also the last layer.
#[derive(Debug)]
pub struct Gpt {
    token: nn::Embedding,
    position: nn::Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    dropout: f64,
}

impl Gpt {
    pub fn new(root: &Path, config: Config) -> Self {
        let Config { vocabulary, context, layers, width, dropout, .. } = config;
        let embedding = nn::EmbeddingConfig { ws_init: normal(0.02), ..Default::default() };
        let block = |layer| Block::new(&(root / "h" / layer), config);
        Self {
            token: nn::embedding(root / "wte", vocabulary, width, embedding),
            position: nn::embedding(root / "wpe", context, width, embedding),
            blocks: (0..layers).map(block).collect(),
            norm: Norm::new(&(root / "ln_f"), width),
            dropout,
        }
    }

    /// Returns `text` (of shape (1, T)) with `count` more characters, each drawn from the scores of those before.
    pub fn generate(&self, text: Tensor, count: usize, temperature: f64) -> Result<Tensor> {
        let (context, _) = self.position.ws.size2()?;
        tch::no_grad(|| {
            (0..count).try_fold(text, |text, _| {
                let seen = text.size()[1].min(context);
                let scores = self.forward_t(&text.f_narrow(1, -seen, seen)?, false);
                let scores = scores.f_select(1, -1)?.f_div_scalar(temperature)?;
                let next = scores.f_softmax(-1, Kind::Float)?.f_multinomial(1, true)?;
                Ok(Tensor::f_cat(&[text, next], 1)?)
            })
        })
    }
}

impl ModuleT for Gpt {
    fn forward_t(&self, tokens: &Tensor, train: bool) -> Tensor {
        let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, tokens.device()));
        let x = tokens.apply(&self.token) + positions.apply(&self.position);
        let x = x.dropout(self.dropout, train);
        let x = self.blocks.iter().fold(x, |x, block| block.forward_t(&x, train));
        x.apply(&self.norm).linear(&self.token.ws, None::<Tensor>)
    }
}

/// Attention and a perceptron, each added to its input.
#[derive(Debug)]
struct Block {
    norm1: Norm,
    attention: nn::Linear,
    attention_out: nn::Linear,
    norm2: Norm,
    hidden: nn::Linear,
    hidden_out: nn::Linear,
    heads: i64,
    dropout: f64,
}

impl Block {
    fn new(root: &Path, config: Config) -> Self {
        let Config { layers, heads, width, dropout, .. } = config;
        let linear = |path: Path, inputs, outputs, std| {
            let config = nn::LinearConfig { ws_init: normal(std), bs_init: None, bias: false };
            nn::linear(path, inputs, outputs, config)
        };
        // Layers whose output is added to a block's input start smaller, the more blocks there are.
        let added = 0.02 / (2. * layers as f64).sqrt();
        Self {
            norm1: Norm::new(&(root / "ln_1"), width),
            attention: linear(root / "attn" / "c_attn", width, 3 * width, 0.02),
            attention_out: linear(root / "attn" / "c_proj", width, width, added),
            norm2: Norm::new(&(root / "ln_2"), width),
            hidden: linear(root / "mlp" / "c_fc", width, 4 * width, 0.02),
            hidden_out: linear(root / "mlp" / "c_proj", 4 * width, width, added),
            heads,
            dropout,
        }
    }

    fn attend(&self, x: &Tensor, train: bool) -> Tensor {
        let size = x.size();
        let heads = |x: &Tensor| {
            x.view([size[0], size[1], self.heads, size[2] / self.heads]).transpose(1, 2)
        };
        let parts = x.apply(&self.attention).chunk(3, 2);
        let (q, k, v) = (heads(&parts[0]), heads(&parts[1]), heads(&parts[2]));
        let dropout = if train { self.dropout } else { 0. };
        let mask = None::<Tensor>;
        Tensor::scaled_dot_product_attention(&q, &k, &v, mask, dropout, true, None, false)
            .transpose(1, 2)
            .reshape(&size)
            .apply(&self.attention_out)
            .dropout(self.dropout, train)
    }
}

impl ModuleT for Block {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let x = x + self.attend(&x.apply(&self.norm1), train);
        let hidden = x.apply(&self.norm2).apply(&self.hidden).gelu("none");
        let added = hidden.apply(&self.hidden_out).dropout(self.dropout, train);
        x + added
    }
}

/// Layer normalisation without bias.
#[derive(Debug)]
struct Norm {
    weight: Tensor,
}

impl Norm {
    fn new(root: &Path, width: i64) -> Self {
        Self { weight: root.ones("weight", &[width]) }
    }
}

impl nn::Module for Norm {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), None::<&Tensor>, 1e-5, false)
    }
}

fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0., stdev }
}
