"""The values of a run, one a line: unit and why. Each is a flag too: `python3 train.py --num_samples 781`."""

from newllm.config import Config


class ResidualConfig(Config):
    preset = "none"  # "seed": GPT-2's vocabulary, output matrix of its own, 91,429,969 parameters

    # Data: token budget = num_samples * max_seq_length (50: 6.4k, 78: 10k, 195: 25k, 390: 50k, 781: 100k)
    data_source = "auto"  # "ultrachat", "chitchat", a path, owner/name[:subset][@revision]; "auto": either
    data_split = ""  # split of a hub or saved dataset to train on; "": "train", or the only one
    data_column = ""  # column with the text or dialogue, or "prompt,response"; "": found by its name
    tokenizer = "auto"  # "gpt2", "bpe" (trained here), "wordllama", a model; "auto": gpt2 or bpe
    vocab_size = 4096  # ids of the "bpe" tokenizer, at most; a big table is wasted on few tokens
    num_samples = 50  # training samples
    num_tokens = 0  # training tokens; when > 0 it sets num_samples = num_tokens // max_seq_length
    max_seq_length = 128  # predictions per sample
    val_samples = 160  # held-out samples from other dialogues; 20k tokens keep perplexity within about 2 %
    tune_share = 0.0  # share of the training samples to validate on, instead of held-out ones
    fit_share = 0.0  # share of the training samples (320 at most) to fit retrieval on, not held-out ones
    cache_dir = "cache"  # folder of tokenized data; may be a link to Google Drive

    # Model
    model_type = "context"  # baselines: "gru", "lstm", "transformer"; controls: "window", "token"
    context_dim = 768  # width of the context c_t
    embed_dim = 768  # width of a token embedding
    num_layers = 6  # residual layers of the context map F
    token_layers = 1  # layers of the head that read context and token stream; 0 reads the token stream alone
    tie_weights = True  # logits through the embedding matrix: fewer parameters, better at this scale
    embeddings = "random"  # "gpt2", "wordllama", a model (folder or hub name): its token vectors, frozen
    init_scale = 0.5  # weights start with std init_scale / sqrt(fan-in); larger makes F chaotic

    # Phase 1: the context
    phase = "both"  # "1" stops after Phase 1; run again with "both" to go on
    phase1_max_iterations = 10  # passes over the samples; 0: Phase 2 starts from the untrained network
    phase1_shuffle = False  # control: sweep over samples whose tokens are in random order
    phase1_convergence_threshold = 0.05  # below this squared change per dimension a token has converged
    phase1_min_converged_ratio = 0.95  # stop when this share of tokens has converged
    phase1_learning_rate = 0.002  # AdamW
    phase1_batch_size = 24  # samples per optimizer step; the regularizer wants 3 * context_dim tokens or more
    dist_reg = "logdet"  # distribution regularizer: "logdet", "covariance" or "dispersion"
    dist_reg_weight = 0.05  # 0: only fixed-point consistency (forgets), 1: only spread (converges slowly)
    context_noise = 0.0  # std of noise added to the contexts a sweep starts from

    # Phase 2: the language model
    phase2_epochs = 16  # passes over the training samples, at most
    phase2_learning_rate = 0.001  # AdamW, warm-up then cosine
    phase2_batch_size = 32  # samples per optimizer step
    untrained_control = True  # also train the head on untrained contexts, to compare with
    freeze_context = False  # True trains only the head on fixed contexts; False also trains F, through time
    whiten_context = False  # control: frozen contexts made uncorrelated, of unit variance on training samples
    context_lr_scale = 1.0  # learning rate of F relative to the head's
    context_adapter = "none"  # "lora": fine-tune F by low-rank additions, merged at the end (needs peft)
    adapter_rank = 0  # rank of these additions; 0: by the device's memory, 4, 8 or 16
    gradient_sweeps = 3  # tokens back that fine-tuning's gradient reaches, a sweep each; 0: the whole sample
    dropout = 0.0  # on the head's inputs and hidden units
    token_dropout = 0.2  # share of the tokens that contexts in training do not see, others each time
    label_smoothing = 0.2  # share of each target that is spread as n-grams of the other samples would
    teachers = ""  # "A.pth,B.pth": label_smoothing then follows these models, not n-grams
    warmup_ratio = 0.1  # share of the steps with rising learning rate
    patience = 3  # epochs without a better validation loss before stopping early
    val_quick_frac = 0.1  # fixed share of the validation samples for checks within an epoch
    val_quick_every_n_batches = 50  # batches between these, at most; one half-way through an epoch; 0: none

    # Retrieval: what the model looks up beside its own prediction
    retrieval = "ngram,cache,knn"  # counts, the text so far, places like this in the training text; "none"
    retrieval_keys = "hidden,tokens"  # places are compared by "hidden" (head), "contexts", last "tokens"
    retrieval_window = 4096  # tokens of the text so far that are looked up

    # Optimizer and machine
    min_batches = 10  # small budgets use smaller batches: every pass takes at least this many optimizer steps
    weight_decay = 3.0  # AdamW decay of matrices: strong, as few samples are read many times
    grad_clip = 1.0  # largest gradient norm
    device = "auto"  # "cuda" if there is one, else "cpu"
    precision = "auto"  # "bf16" where the hardware has it, "fp16" on older GPUs, else "fp32"
    context_memory_mb = 512  # contexts of the training samples beyond this live in files in checkpoint_dir
    compile = False  # torch.compile of the context map
    attention = "auto"  # kernel of the Transformer's attention: "flash", "math", or as torch chooses
    gpu_memory_fraction = 1.0  # share of the GPU's memory this process may take; less where others share it
    seed = 42  # fixes data order, initialisation and dropout

    # Checkpoints
    save_checkpoint = True  # write checkpoints
    load_checkpoint = True  # continue from checkpoint_dir/model_latest.pt when it is there and fits
    checkpoint_dir = "checkpoints"  # folder of everything a run writes; may be a link to Google Drive
    save_every_n_batches = 100  # batches between checkpoints
    save_min_seconds = 30.0  # least seconds between two saves by batches; a fast GPU would save all the time
    save_every_minutes = 10.0  # minutes between checkpoints, at most; 0: by batches alone
    keep_last = 2  # older states to keep as model_step_*.pt beside the latest and the previous one
    backup_dir = ""  # second copies of the checkpoints, e.g. on Google Drive, made behind the run; "": none
    backup_every_minutes = 10.0  # least time between two rounds of such copies
    max_minutes = 0.0  # stop in good order, with a checkpoint, after this many minutes; 0: no limit
    artifacts = True  # leave tables, pictures, a page and the best model in a folder named after the data
    trackers = "none"  # live figures in "tensorboard", "trackio" or "wandb", which must be installed
