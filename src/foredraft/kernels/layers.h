/* Single layers, for draft heads that are not decoders. decoder.c includes this file at its end. */

/* Runs linear layers one after another, each from x [rows][in] to y [rows][out]. Returns 0, or 1 if memory runs out. */
int foredraft_linears(const Linear *layers, int64_t count, const bf16 *x, int64_t rows, float *y, int64_t threads) {
    int64_t size = 0;
    for (int64_t i = 0; i < count; i++) size = most(size, layers[i].in);
    float *room = aligned_alloc(64, (size_t)(rows * size + 16) / 16 * 16 * sizeof(float));
    Hands hands = {.threads = enlist(threads), .room = {room}};
    for (int64_t i = 0; room && i < count; i++) linear(&hands, layers + i, x, rows, y, 0);
    dismiss();
    free(room);
    return room == NULL;
}

typedef struct {
    const float *gate;
    float *state;
    bf16 *x;
    int64_t size;
} Added;

/* state += silu(gate), and the sum becomes the next input. */
static void add_row(const void *given, int64_t row, int id) {
    const Added *job = given;
    (void)id;
    for (int64_t i = row * job->size; i < (row + 1) * job->size; i += 16) {
        __m512 v = _mm512_loadu_ps(job->gate + i), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), v));
        v = _mm512_add_ps(_mm512_loadu_ps(job->state + i), _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1.0f), e)));
        _mm512_storeu_ps(job->state + i, v);
        narrow(job->x + i, v);
    }
}

/* Runs residual blocks one after another, from x [rows][in] to y [rows][out]. All blocks have the same number of outputs. Returns
   0, or 1 if memory runs out. */
int foredraft_residuals(const Residual *blocks, int64_t count, const bf16 *x, int64_t rows, bf16 *y, int64_t threads) {
    const int64_t size = blocks->linear.out, inputs = most(blocks->linear.in, size);
    float *room = aligned_alloc(64, (size_t)(rows * (inputs + 2 * size) + 16) / 16 * 16 * sizeof(float));
    Hands hands = {.threads = enlist(threads), .room = {room}};
    Added job = {.gate = room + rows * inputs, .state = room + rows * (inputs + size), .x = y, .size = size};
    for (int64_t i = 0; room && i < count; i++, x = y) {
        if (blocks[i].skip.weight) linear(&hands, &blocks[i].skip, x, rows, job.state, 0);
        else if (i == 0)
            for (int64_t j = 0; j < rows * size; j += 16) _mm512_storeu_ps(job.state + j, widen(x + j));
        linear(&hands, &blocks[i].linear, x, rows, room + rows * inputs, 0);
        parallel(hands.threads, add_row, &job, rows);
    }
    dismiss();
    free(room);
    return room == NULL;
}
