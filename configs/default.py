"""Every setting there is, with its default; the other files in this folder start from here.

Command: `mila train --config=configs/default.py --config.data.dir=DIR --config.train.dir=DIR`. The model is the 1.2 B parameter STDiT3-XL/2 layout
over 224×400 images; chips, memory per chip and FLOPs per step: not measured. Use `configs/tiny.py` on one machine.

Settings are changed on the command line by their path, `--config.train.steps=100`. Sizes that must agree with each other are
checked before anything is compiled.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The full tree of settings."""
    c = ConfigDict()
    c.seed = 0

    # The simulated world, written in nuScenes' format (`mila simulate`).
    c.simulate = ConfigDict()
    c.simulate.scenes = 8
    c.simulate.val_scenes = 1  # the first ones
    c.simulate.workers = 0  # processes; 0 = one for each core
    c.simulate.seconds = 20.0
    c.simulate.height = 224  # pixels of each camera's image
    c.simulate.width = 400
    c.simulate.seed = 0
    c.simulate.jpeg_quality = 92

    # Images → latents, texts → tokens (`mila prepare`).
    c.data = ConfigDict()
    c.data.nuscenes = placeholder(str)  # folder of a nuScenes v1.0 data set, real or simulated
    c.data.version = "v1.0-sim"
    c.data.dir = placeholder(str)  # folder of the encoded data set
    c.data.image_size = (224, 400)  # pixels (height, width); images of another size are resized
    c.data.foreground = False  # also where vehicles are, from the annotated boxes (for train.foreground_weight)
    c.data.encode_batch = 24  # images at a time, over all devices of a host
    c.data.workers = 1  # encoding processes on this machine (CPUs only; an accelerator belongs to one process)

    c.autoencoder = ConfigDict()
    # .safetensors of a trained autoencoder, or published AutoencoderKL weights (Open-Sora's whole VAE file, too), also gs://; none: the
    # shipped one for simulated frames.
    c.autoencoder.path = placeholder(str)
    # A temporal autoencoder on top (Open-Sora's): none | frame (one latent a frame) | chunk17 (17 frames → 5 latents; windows then count latents,
    # in multiples of 5, and train.fps is 12 or one latent a chunk, 0.706).
    c.autoencoder.temporal = "none"
    c.autoencoder.temporal_path = placeholder(str)  # its weights; none: in the file of autoencoder.path (Open-Sora's whole VAE)

    c.text = ConfigDict()
    # minilm | table | t5 (captions cleaned as by Open-Sora 1.2) | t5-raw (as they are) | auto (minilm if its weights are installed)
    c.text.encoder = "auto"
    c.text.length = 32  # tokens (T5: 300 as published; fewer change nothing where texts are shorter)
    c.text.path = placeholder(str)  # of t5: a folder, .safetensors or gs:// address of T5 v1.1's encoder
    c.text.tokenizer = placeholder(str)  # of t5: spiece.model or tokenizer.json; none: beside the weights

    c.model = ConfigDict()
    c.model.width = 1152
    c.model.depth = 28  # pairs of a spatial and a temporal block
    c.model.heads = 16
    c.model.patch = (1, 2, 2)
    c.model.mlp_ratio = 4.0
    c.model.input_sq_size = 512
    c.model.pred_sigma = False
    c.model.qk_norm = True
    c.model.fourier_bands = 8
    c.model.ray_rotary = False  # viewing directions as rotary embedding in spatial attention (ours; published weights have none)
    c.model.precondition = "none"  # none | motion (mila_jax/model/precondition.py)
    c.model.sweep = 0  # with motion: corridors, up to 9, over which frames are carried for the network to choose from (same file)
    c.model.evidence = False  # with a sweep: the network is told which corridor is right where (mila_jax/model/evidence.py)
    c.model.mixture = False  # with a sweep: the network also weighs what the corridors show, place by place (mila_jax/model/precondition.py)
    c.model.detail = 0  # channels of convolutions at every place of the latents, beside the patches (mila_jax/model/detail.py); 0 = none
    c.model.dtype = "bfloat16"
    c.model.remat = "block"  # none | dots+attention | dots | attention+mlp | attention+results | attention | block | offload, or two of them for
    # the first pairs and for the others, dots:4:block (mila_jax/model/remat.py)

    # How attention is computed, and what is split over `mesh.context` (mila_jax/parallel/logical.py).
    c.attention = ConfigDict()
    c.attention.kernel = "xla"  # xla | splash (spatial attention by TPU's splash kernel; elsewhere the same by XLA)
    c.attention.temporal = "xla"  # xla | fused (norm, rotary embedding and temporal attention in one TPU kernel; not with kv_gather)
    c.attention.text = "xla"  # xla | fused (attention to the text in one TPU kernel)
    c.attention.parallel = "context"  # none | context | heads | kv_gather

    # A window and its noise (the paper's TPD and JDC). Training and generation share these.
    c.window = ConfigDict()
    c.window.frames = 8  # T, conditioning frames included
    c.window.conditioning = 2  # N clean first frames at 12 Hz
    c.window.anchor_stride = 6  # 12 Hz frames from one coarse frame to the next: 6 = 2 Hz, one of train.fps. Every window ends in the last of its own
    # True: where windows have several coarse frames (4 + 6 frames and a stride of 3: two), all of them are anchors, not only the last.
    c.window.inner_anchors = False
    c.window.anchor_error = 0.15  # a: how wrong a coarse anchor is taken to be (reconstructed)
    c.window.anchor_level = 0.4  # σ_a: noise level from which an anchor is corrected; at least anchor_error (reconstructed)
    c.window.tpd_family = "exponential"  # power | rational | exponential
    c.window.tpd_strength = 0.5  # α; 0 = all frames at one level (family and strength reconstructed)

    c.train = ConfigDict()
    c.train.dir = placeholder(str)  # metrics, weights, config, checkpoints: a folder, or gs://BUCKET/RUN (with several machines, one that all see)
    c.train.checkpoints = placeholder(str)  # checkpoints elsewhere than in train.dir
    c.train.steps = 20_000
    c.train.minutes = 0.0  # > 0: stop cleanly after so many minutes
    c.train.batch = 64  # samples a step, over all devices
    c.train.optimizer = "adamw"  # adamw | muon (the blocks' matrices by Muon, all else by AdamW with Nesterov momentum)
    c.train.learning_rate = 1e-4
    c.train.warmup = 1000  # steps, linear
    c.train.decay = False  # cosine to a twentieth of the learning rate at train.steps
    c.train.beta2 = 0.999
    c.train.weight_decay = 0.0
    c.train.epsilon = 1e-15
    c.train.clip = 1.0  # global gradient norm
    c.train.ema = 0.999  # warmed up: min(ema, (1 + step) / (10 + step))
    c.train.level = "logit-normal"  # how σ is drawn: logit-normal | uniform
    c.train.tpd_rate = 0.5  # share of samples whose frames have TPD-shaped levels instead of one level for all
    c.train.context_rate = 0.0  # share of samples whose first frames are noisy too, so that a long video's own errors are not taken for truth …
    c.train.context_level = 0.2  # … at levels up to this (ours; noise augmentation, as in cascaded diffusion)
    c.train.text_drop = 0.1
    c.train.waypoint_drop = 0.1
    c.train.fps = (12.0, 2.0, 1.0)  # rates of the generated frames …
    c.train.fps_weights = (0.6, 0.35, 0.05)  # … and their shares
    c.train.anchor_rate = 0.7  # share of 12 Hz samples that have a tail anchor …
    c.train.anchor_noisy = 0.75  # … of which so many are to be corrected (stage 3), the others are clean
    c.train.conditioning_fps = "both"  # of windows below 12 Hz: video (first frames at 12 Hz) | same (as the generated ones) | both (half of each)
    c.train.single_frame = 0.1  # share of the 12 Hz windows that start from one frame instead of window.conditioning …
    c.train.single_frame_anchors = False  # … and of the others too
    c.train.four_frames = 0.0  # share of the windows of every rate that start from four frames
    # How many times more places count in the loss that vehicles cover (needs data.foreground; ours). Held-out losses are told without it. It tilts
    # what is learned: where a vehicle may or may not be, one becomes more likely than it is. Train on without it at the end. Hardly so with
    # foreground_of "given": a view's places all count 1 + foreground_weight · (the share of it that vehicles cover in the window's first frames).
    c.train.foreground_weight = 0.0
    c.train.foreground_of = "places"  # places | given
    c.train.trainable = ("*",)  # patterns of parameter names; what none of them names is frozen (mila_jax/train/stages.py)
    c.train.accumulate = 1  # parts that a batch is taken in, one after the other
    c.train.moments = "float32"  # of the optimizer: float32 | bfloat16 (half the optimizer's memory, stochastically rounded)
    c.train.explode = 10.0  # a loss this many times the average is not believed: the step is skipped, like one that is no number
    c.train.skip_limit = 20  # steps skipped in a row after which the run stops
    c.train.checkpoint_every = 500
    c.train.keep = 2  # newest checkpoints …
    c.train.keep_every = 0  # … and for ever those whose step divides by this; 0 = none
    c.train.save_failures = 3  # checkpoints in a row that cannot be written (disk full) until the run stops
    c.train.log_every = 20
    c.train.eval_every = 500  # loss at 10 fixed noise levels on held-out clips; 0 = never
    c.train.eval_batches = 2
    c.train.eval_picture = True  # and a small generated clip as a picture
    c.train.eval_steps = 10  # denoising steps of that clip
    c.train.profile = (0, 0)  # (first step, number of steps) to record for TensorBoard's profiler
    c.train.wandb = placeholder(str)  # project of Weights & Biases to write metrics to, if wandb is installed
    c.train.init_from = placeholder(str)  # weights to start from: .safetensors of `mila`, or a published STDiT3 state dict

    # Several machines (mila_jax/parallel/distributed.py).
    c.distributed = ConfigDict()
    c.distributed.initialize = "auto"  # auto (on a TPU slice of several machines, or if MILA_COORDINATOR is set) | always | never

    c.generate = ConfigDict()
    c.generate.weights = placeholder(str)  # .safetensors or a training folder; none: the shipped model
    c.generate.steps = 50
    c.generate.strategy = "coarse_to_refine"  # recurrent | divide_and_conquer | coarse_to_refine
    c.generate.jdc = True  # False: anchors are not corrected, which makes coarse_to_refine divide_and_conquer
    c.generate.window = 0  # frames of a window, conditioning included; 0 = as trained, here and in the next two
    c.generate.conditioning = 0  # clean first frames of a window
    # 12 Hz frames from one coarse frame to the next, a multiple or a divisor of the new frames of a window, which it is where the trained one is neither
    c.generate.anchor_stride = 0
    c.generate.inner_anchors = placeholder(bool)  # window.inner_anchors; none: as trained
    c.generate.guidance_text = 1.0  # 1 = none
    c.generate.guidance_waypoints = 1.0
    # Autoguidance, `guidance_model` times as far from what a weaker model does: `guide` names its weights as `weights` does (none: the shipped guide
    # for the shipped model, and no guidance for others); 1 = none, and no guide is read. Recurrent videos of a minute get worse by it
    # (mila_jax/weights/MODEL_CARD.md).
    c.generate.guide = placeholder(str)
    c.generate.guidance_model = 1.25
    c.generate.guidance_batched = True  # with and without conditions in one pass over a larger batch; False: one after the other, in less memory
    c.generate.shift = 1.0  # timestep shift R: times t → R t / (1 + (R - 1) t); 0 = Open-Sora's R for the image size and window
    c.generate.temperature = 1.0  # scale of the noise that frames start from; below 1: calmer pictures, less variety
    c.generate.context_level = 0.0  # noise level of the frames that a window starts from; for models trained with train.context_rate
    c.generate.windows_per_call = 1  # windows that leave the device together
    c.generate.decode_frames = 4  # frames that go through the autoencoder together …
    c.generate.decode_views = 0  # … of so many views; 0 = all
    c.generate.decode_tile = 0  # latents along each side of a tile; 0 = whole images

    # What `mila plan` takes a data set to be, so that it needs none. Every other command reads these from the data.
    c.plan = ConfigDict()
    c.plan.compression = 8  # pixels per latent along rows and columns
    c.plan.latent_channels = 8
    c.plan.text_width = 384  # channels of a text token
    c.plan.sample_batch = 1  # videos at a time in the sampling step

    # Devices: sizes of the mesh axes; -1 = all that are left.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.context = 1
    c.mesh.tensor = 1
    c.mesh.dcn_data = -1  # slices, all along mesh.data; -1 = as many as the devices lie in
    c.mesh.gather = "layer"  # layer | step: when kernels split over mesh.fsdp are made whole (mila_jax/parallel/logical.py)
    c.mesh.rules = ConfigDict()  # logical axis → mesh axis, tuple or None; laid over the table in mila_jax/parallel/logical.py
    return c
