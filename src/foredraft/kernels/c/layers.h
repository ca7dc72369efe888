/* Single layers, for draft heads that are not decoders. set.c includes this file after decoder.h. */

/* Runs a linear layer from x [rows][in], in the type of the model, to y [rows][out]. Returns 0, or 1 if memory runs out. */
int EXPORT(linear)(const Linear *layer, int64_t type, const void *x, int64_t rows, float *y, int64_t threads) {
    const int64_t size = rows * layer->in;
    char *room = aligned_alloc(64, (size_t)(4 * size + room_of(rows, layer->in) + 63) / 64 * 64 + 64);
    Workspace workspace = {.threads = enlist(threads), .type = type, .room = {room + 4 * size}};
    if (room) {
        for (int64_t i = 0; i < size; i += LANES) store_input((int)type, room, i, load((int)type, x, i));
        linear(&workspace, layer, room, rows, y, 0);
    }
    dismiss();
    free(room);
    return room == NULL;
}

typedef struct {
    const float *gate;
    float *state;
    void *x, *y;
    int64_t size, type;
} Added;

/* state += silu(gate), and the sum becomes the next input and the output. */
static void add_row(const void *given, int64_t row, int id) {
    const Added *job = given;
    (void)id;
    for (int64_t i = row * job->size; i < (row + 1) * job->size; i += LANES) {
        const V sum = v_add(v_load(job->state + i), silu(v_load(job->gate + i)));
        v_store(job->state + i, sum);
        store_input((int)job->type, job->x, i, sum);
        store((int)job->type, job->y, i, sum);
    }
}

/* Runs residual blocks one after another, from x [rows][in] to y [rows][out], in the type of the model. All blocks have the same
   number of outputs. Returns 0, or 1 if memory runs out. */
int EXPORT(residuals)(const Residual *blocks, int64_t count, int64_t type, const void *x, int64_t rows, void *y, int64_t threads) {
    const int64_t size = blocks->linear.out, first = blocks->linear.in, widest = most(first, size);
    float *room = aligned_alloc(64, (size_t)(rows * (widest + 2 * size) * 4 + room_of(rows, widest) + 63) / 64 * 64 + 64);
    float *gate = room + rows * widest, *state = gate + rows * size;
    Workspace workspace = {.threads = enlist(threads), .type = type, .room = {state + rows * size}};
    Added job = {.gate = gate, .state = state, .x = room, .y = y, .size = size, .type = type};
    for (int64_t i = 0; room && i < rows * first; i += LANES) store_input((int)type, room, i, load((int)type, x, i));
    for (int64_t i = 0; room && i < count; i++) {
        if (blocks[i].skip.weight) linear(&workspace, &blocks[i].skip, room, rows, state, 0);
        else if (i == 0)
            for (int64_t j = 0; j < rows * size; j += LANES) v_store(state + j, load((int)type, x, j));
        linear(&workspace, &blocks[i].linear, room, rows, gate, 0);
        over_rows(workspace.threads, add_row, &job, rows, 2 * size);
    }
    dismiss();
    free(room);
    return room == NULL;
}
