// SPDX-License-Identifier: MIT
/*
 * Orders records of rings by time, and writes them as JSON lines. Python is too slow for both.
 *
 * It uses neither Python's API nor the schema. Python passes the parts of a line (struct op) and,
 * once for each value of a block, the block's texts in JSON.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

static u64 load(const u8 *at, u32 width)
{
	u16 two;
	u32 four;
	u64 eight;

	switch (width) {
	case 1:
		return *at;
	case 2:
		memcpy(&two, at, 2);
		return two;
	case 4:
		memcpy(&four, at, 4);
		return four;
	default:
		memcpy(&eight, at, 8);
		return eight;
	}
}

/* --- the reorder buffer: records that an older one may still follow */

struct entry {
	u64 ts_ns;
	u32 at;     /* in `data` */
	u32 source; /* index of its codec */
};

struct buffer {
	struct entry *entries; /* the oldest first */
	u64 count, capacity;
	u8 *data;
	u64 data_used, data_capacity;
	u8 *popped; /* the result of buffer_pop() */
	u64 popped_capacity;
};

struct buffer *buffer_new(void)
{
	return calloc(1, sizeof(struct buffer));
}

void buffer_free(struct buffer *buffer)
{
	free(buffer->entries);
	free(buffer->data);
	free(buffer->popped);
	free(buffer);
}

/* Makes space for one more record of `size` bytes. */
static bool reserve(struct buffer *buffer, u32 size)
{
	void *grown;

	if (buffer->count == buffer->capacity) {
		u64 wanted = buffer->capacity ? 2 * buffer->capacity : 1024;

		grown = realloc(buffer->entries, wanted * sizeof(*buffer->entries));
		if (!grown)
			return false;
		buffer->entries = grown;
		buffer->capacity = wanted;
	}
	if (buffer->data_capacity - buffer->data_used < size) {
		u64 wanted = 2 * buffer->data_capacity + size;

		grown = wanted >> 32 ? NULL : realloc(buffer->data, wanted);
		if (!grown)
			return false;
		buffer->data = grown;
		buffer->data_capacity = wanted;
	}
	return true;
}

/*
 * Merges the entries from `from` on into those before; the sort is stable.
 *
 * Records of one ring are out of order only if a handler was interrupted: few, and by few places,
 * so that an insertion sort is enough for them.
 */
static bool put_in_order(struct buffer *buffer, u64 from)
{
	struct entry *entries = buffer->entries, *fresh, *last, *old, *to;
	u64 count = buffer->count;

	for (u64 i = from + 1; i < count; i++) {
		struct entry one = entries[i];
		u64 at = i;

		for (; at > from && entries[at - 1].ts_ns > one.ts_ns; at--)
			entries[at] = entries[at - 1];
		entries[at] = one;
	}
	if (!from || from == count || entries[from - 1].ts_ns <= entries[from].ts_ns)
		return true;
	fresh = malloc((count - from) * sizeof(*fresh));
	if (!fresh)
		return false;
	memcpy(fresh, entries + from, (count - from) * sizeof(*fresh));
	last = fresh + (count - from);
	old = entries + from;
	to = entries + count;
	while (last > fresh) {
		if (old > entries && old[-1].ts_ns > last[-1].ts_ns)
			*--to = *--old;
		else
			*--to = *--last;
	}
	free(fresh);
	return true;
}

/* A mapped ring (kernel/bpf/ringbuf.c), and the layout of its records. */
struct ring {
	u64 *consumer;
	u64 *producer;
	u8 *data;
	u64 size, page;
	u32 record, ts_at, tag_at, source;
	u64 taken[256]; /* records by the byte at tag_at */
};

void ring_unmap(struct ring *ring)
{
	if (ring->consumer != MAP_FAILED)
		munmap(ring->consumer, ring->page);
	if (ring->producer != MAP_FAILED)
		munmap(ring->producer, ring->page + 2 * ring->size);
	free(ring);
}

struct ring *ring_map(int fd, u64 size, u32 record, u32 ts_at, u32 tag_at, u32 source)
{
	struct ring *ring = calloc(1, sizeof(*ring));

	if (!ring)
		return NULL;
	ring->page = sysconf(_SC_PAGESIZE);
	ring->size = size;
	ring->record = record;
	ring->ts_at = ts_at;
	ring->tag_at = tag_at;
	ring->source = source;
	ring->consumer = mmap(NULL, ring->page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ring->producer = mmap(NULL, ring->page + 2 * size, PROT_READ, MAP_SHARED, fd, ring->page);
	if (ring->consumer == MAP_FAILED || ring->producer == MAP_FAILED) {
		ring_unmap(ring);
		return NULL;
	}
	ring->data = (u8 *)ring->producer + ring->page;
	return ring;
}

const u64 *ring_taken(const struct ring *ring)
{
	return ring->taken;
}

#define BUSY (1u << 31)
#define DISCARD (1u << 30)
#define WRONG_SIZE (-1)
#define NO_MEMORY (-2)

/*
 * Moves at most `most` committed records from the ring into the buffer.
 * Returns the time of the last one if there were `most`, else 0; WRONG_SIZE for a record of
 * another size; NO_MEMORY.
 */
s64 buffer_take(struct buffer *buffer, struct ring *ring, u32 most)
{
	u64 here = *ring->consumer, end = __atomic_load_n(ring->producer, __ATOMIC_ACQUIRE);
	u64 stride = 8 + (ring->record + 7) / 8 * 8, from = buffer->count;
	s64 result = 0;
	u32 came = 0;

	while (here < end) {
		const u8 *head = ring->data + (here & (ring->size - 1));
		u32 length = __atomic_load_n((const u32 *)head, __ATOMIC_ACQUIRE);

		if (length & BUSY)
			break;
		if ((length & ~DISCARD) != ring->record) {
			result = WRONG_SIZE;
			break;
		}
		if (!(length & DISCARD)) {
			struct entry *entry;

			if (!reserve(buffer, ring->record)) {
				result = NO_MEMORY;
				break;
			}
			entry = &buffer->entries[buffer->count++];
			entry->ts_ns = load(head + 8 + ring->ts_at, 8);
			entry->at = buffer->data_used;
			entry->source = ring->source;
			memcpy(buffer->data + buffer->data_used, head + 8, ring->record);
			buffer->data_used += ring->record;
			ring->taken[head[8 + ring->tag_at]]++;
			came++;
		}
		here += stride;
		if (came == most) {
			result = buffer->entries[buffer->count - 1].ts_ns;
			break;
		}
	}
	__atomic_store_n(ring->consumer, here, __ATOMIC_RELEASE);
	return put_in_order(buffer, from) ? result : NO_MEMORY;
}

/* Time of the oldest record; 0 if the buffer is empty. */
u64 buffer_oldest_ns(const struct buffer *buffer)
{
	return buffer->count ? buffer->entries[0].ts_ns : 0;
}

/* Copies the remaining records to a new buffer without gaps. Without memory the gaps stay. */
static void close_gaps(struct buffer *buffer, const u32 *sizes)
{
	u8 *data = malloc(buffer->data_capacity);
	u64 used = 0;

	if (!data)
		return;
	for (u64 i = 0; i < buffer->count; i++) {
		struct entry *entry = &buffer->entries[i];
		u32 size = sizes[entry->source];

		memcpy(data + used, buffer->data + entry->at, size);
		entry->at = used;
		used += size;
	}
	free(buffer->data);
	buffer->data = data;
	buffer->data_used = used;
}

/* Records returned by buffer_pop(); valid until its next call. */
struct popped {
	u64 count, bytes, first_ns, last_ns;
	const u8 *records; /* one after the other */
	const u8 *sources; /* index of the source of each */
};

/* Removes the records older than `before_ns`, oldest first. `sizes`: record size by source. */
int buffer_pop(struct buffer *buffer, u64 before_ns, const u32 *sizes, struct popped *popped)
{
	u64 count = buffer->count, bytes = 0;
	u8 *record;

	while (count && buffer->entries[count - 1].ts_ns >= before_ns)
		count--;
	popped->count = count;
	if (!count)
		return 0;
	for (u64 i = 0; i < count; i++)
		bytes += sizes[buffer->entries[i].source];
	if (bytes + count > buffer->popped_capacity) {
		free(buffer->popped);
		buffer->popped_capacity = 2 * (bytes + count);
		buffer->popped = malloc(buffer->popped_capacity);
		if (!buffer->popped) {
			buffer->popped_capacity = 0;
			return NO_MEMORY;
		}
	}
	record = buffer->popped;
	for (u64 i = 0; i < count; i++) {
		const struct entry *entry = &buffer->entries[i];
		u32 size = sizes[entry->source];

		memcpy(record, buffer->data + entry->at, size);
		record += size;
		buffer->popped[bytes + i] = entry->source;
	}
	popped->bytes = bytes;
	popped->first_ns = buffer->entries[0].ts_ns;
	popped->last_ns = buffer->entries[count - 1].ts_ns;
	popped->records = buffer->popped;
	popped->sources = buffer->popped + bytes;
	buffer->count -= count;
	memmove(buffer->entries, buffer->entries + count, buffer->count * sizeof(*buffer->entries));
	if (buffer->count)
		close_gaps(buffer, sizes);
	else
		buffer->data_used = 0;
	return 0;
}

/* --- JSON lines */

enum kind { TEXT, CHOICE, INTEGER, SIGNED, INSTANT, MICROS, ABSENT };

/*
 * A part of a line, or a number of a slim row.
 *
 * TEXT, CHOICE: the text `text`, or the id, of the record's block `block`; CHOICE: `other` instead
 * if the u32 at `at` is 0. INTEGER, SIGNED, MICROS: the number of `width` bytes at `at`; ns
 * as us. INSTANT: the same plus the offset of the clock. `has`: null if the record's `has`
 * lacks that bit; `nullable`: null if it is 0. ABSENT, of a slim row: there is no such field.
 */
struct op {
	u8 kind, width, nullable, has;
	u32 at, block, text, other;
};

#define IDS 5

/* The texts of a block, cached by the block's bytes. */
struct block {
	u32 at, size, texts;
	u32 count;
	u32 *slots;    /* index of a meaning + 1, by hash; 0: none */
	u8 **meanings; /* the block's bytes, u32 ids[IDS + 1], struct text[texts], then the texts */
};

struct text {
	u32 at, length; /* from the first of these structs on */
};

/* Texts are copied in steps of this size; the bytes after each text may be read that far. */
#define STEP 32

#define MEANINGS 16384
#define SLOTS (4 * MEANINGS)

struct codec {
	u32 size, has_at, blocks, ops, columns;
	struct block *block;
	struct op *op, *column;
};

void codec_free(struct codec *codec);

/* `op`: the parts of a line, then the numbers of a slim row. */
struct codec *codec_new(u32 size, u32 has_at, u32 blocks, const u32 *places, u32 ops, u32 columns,
			const struct op *op)
{
	struct codec *codec = calloc(1, sizeof(*codec));

	if (!codec)
		return NULL;
	codec->size = size;
	codec->has_at = has_at;
	codec->block = calloc(blocks, sizeof(*codec->block));
	codec->op = calloc(ops + columns, sizeof(*op));
	if (!codec->block || !codec->op)
		goto failed;
	memcpy(codec->op, op, (ops + columns) * sizeof(*op));
	codec->column = codec->op + ops;
	codec->ops = ops;
	codec->columns = columns;
	for (u32 i = 0; i < blocks; i++) {
		struct block *block = &codec->block[i];

		block->at = places[3 * i];
		block->size = places[3 * i + 1];
		block->texts = places[3 * i + 2];
		block->slots = calloc(SLOTS, sizeof(*block->slots));
		block->meanings = calloc(MEANINGS, sizeof(*block->meanings));
		codec->blocks = i + 1;
		if (!block->slots || !block->meanings)
			goto failed;
	}
	return codec;
failed:
	codec_free(codec);
	return NULL;
}

static void clear_block(struct block *block)
{
	for (u32 i = 0; i < block->count; i++)
		free(block->meanings[i]);
	block->count = 0;
	if (block->slots)
		memset(block->slots, 0, SLOTS * sizeof(*block->slots));
}

void codec_free(struct codec *codec)
{
	for (u32 i = 0; i < codec->blocks; i++) {
		struct block *block = &codec->block[i];

		clear_block(block);
		free(block->slots);
		free(block->meanings);
	}
	free(codec->block);
	free(codec->op);
	free(codec);
}

/* The slot of a block's value, or the free slot for it. */
static u32 *slot_of(const struct block *block, const u8 *value)
{
	u64 hash = block->size;
	u32 i = 0;

	for (; i + 8 <= block->size; i += 8) {
		hash = (hash ^ load(value + i, 8)) * 0x9e3779b97f4a7c15u;
		hash ^= hash >> 32;
	}
	for (; i < block->size; i++)
		hash = (hash ^ value[i]) * 0x9e3779b97f4a7c15u;
	for (u32 at = hash >> 40;; at++) {
		u32 *slot = &block->slots[at % SLOTS];

		if (!*slot || !memcmp(block->meanings[*slot - 1], value, block->size))
			return slot;
	}
}

/* Forgets what is cached of all blocks. */
void codec_forget(struct codec *codec)
{
	for (u32 i = 0; i < codec->blocks; i++)
		clear_block(&codec->block[i]);
}

/*
 * Caches the texts of a value of a block; `ends` are the ends of the texts, `ids` the numbers that
 * stand for its values in slim rows.
 */
int codec_learn(struct codec *codec, u32 which, const u8 *value, const u8 *texts, const u32 *ends,
		const u32 *ids)
{
	struct block *block = &codec->block[which];
	u32 heads = block->texts * sizeof(struct text), begin = 0;
	u32 size = ((block->size + 7) & ~7u) + (IDS + 1) * sizeof(*ids);
	u8 *meaning = malloc(size + heads + ends[block->texts - 1] + STEP);

	if (!meaning)
		return NO_MEMORY;
	if (block->count == MEANINGS)
		clear_block(block);
	memcpy(meaning, value, block->size);
	memcpy(meaning + size - (IDS + 1) * sizeof(*ids), ids, IDS * sizeof(*ids));
	for (u32 i = 0; i < block->texts; i++) {
		((struct text *)(meaning + size))[i] =
			(struct text){heads + begin, ends[i] - begin};
		begin = ends[i];
	}
	memcpy(meaning + size + heads, texts, begin);
	block->meanings[block->count] = meaning;
	*slot_of(block, value) = ++block->count;
	return 0;
}

#define LONGEST_NUMBER 32

/* Eight digits, the first in the lowest byte: each step divides all of its numbers at once. */
static u64 digits_of(u32 number)
{
	u64 four = number / 10000 | (u64)(number % 10000) << 32;
	u64 high = four * 10486 >> 20 & 0x0000007f0000007f; /* /100, below 10,000 */
	u64 two = high | (four - high * 100) << 16;
	u64 tens = two * 103 >> 10 & 0x000f000f000f000f; /* /10, below 100 */

	return tens | (two - tens * 10) << 8;
}

static void put_eight(u8 *to, u64 digits)
{
	digits |= 0x3030303030303030;
	if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)
		digits = __builtin_bswap64(digits);
	memcpy(to, &digits, 8);
}

/* Writes at most 20 digits; overwrites up to LONGEST_NUMBER bytes. */
static u8 *put_number(u8 *to, u64 number)
{
	u32 parts[2], more = 0;
	u64 top;

	while (number >= 100000000) {
		parts[more++] = number % 100000000;
		number /= 100000000;
	}
	top = digits_of(number);
	/* Shifts leading zeros out; 0 keeps one digit. */
	number = number ? __builtin_ctzll(top) / 8 : 7;
	put_eight(to, top >> 8 * number);
	to += 8 - number;
	while (more) {
		put_eight(to, digits_of(parts[--more]));
		to += 8;
	}
	return to;
}

/* ns as us, as the shortest text of the nearest double: for 15 digits that is the number itself. */
#define MOST_NS 1000000000000000u

static u8 *put_micros(u8 *to, u64 ns)
{
	u32 rest = ns % 1000;

	to = put_number(to, ns / 1000);
	*to++ = '.';
	*to++ = '0' + rest / 100;
	if (rest % 100)
		*to++ = '0' + rest / 10 % 10;
	if (rest % 10)
		*to++ = '0' + rest % 10;
	return to;
}

enum status { DONE, FULL, UNKNOWN, CANNOT };

/* Progress of lines(). */
struct progress {
	u64 next; /* record */
	u64 at;   /* its bytes */
	u64 written;
	u32 block; /* UNKNOWN: of the next record's codec */
};

/* Finds what is cached of the first `blocks` blocks of a record: from their ids on. */
static int find_meanings(const struct codec *codec, u32 blocks, const u8 *record,
			 const u8 **meanings, struct progress *progress)
{
	for (u32 i = 0; i < blocks; i++) {
		const struct block *block = &codec->block[i];
		u32 slot = *slot_of(block, record + block->at);

		if (!slot) {
			progress->block = i;
			return UNKNOWN;
		}
		meanings[i] = block->meanings[slot - 1] + ((block->size + 7) & ~7u);
	}
	return DONE;
}

static s64 signed_of(u64 value, u32 width)
{
	return (s64)(value << (64 - 8 * width)) >> (64 - 8 * width);
}

/* Adds the offset of the clock; false if the sum is no time. */
static bool to_unix(u64 *value, s64 offset_ns)
{
	if (offset_ns < 0 ? *value < -(u64)offset_ns : *value + offset_ns < *value)
		return false;
	*value += offset_ns;
	return true;
}

static int line(const struct codec *codec, const u8 *record, s64 offset_ns, u8 **out, const u8 *end,
		struct progress *progress)
{
	const u8 *meaning[16];
	u8 *to = *out;
	int found = find_meanings(codec, codec->blocks, record, meaning, progress);

	if (found != DONE)
		return found;
	for (u32 i = 0; i < codec->ops; i++) {
		const struct op *op = &codec->op[i];
		const struct text *text;
		u64 value;

		if (end - to < LONGEST_NUMBER)
			return FULL;
		if (op->has && !(record[codec->has_at] & op->has))
			goto null;
		if (op->kind <= CHOICE) {
			bool other = op->kind == CHOICE && !load(record + op->at, 4);
			const u8 *texts = meaning[op->block] + (IDS + 1) * sizeof(u32);

			text = (const struct text *)texts + (other ? op->other : op->text);
			if (end - to < text->length + STEP)
				return FULL;
			for (u32 done = 0; done < text->length; done += STEP)
				memcpy(to + done, texts + text->at + done, STEP);
			to += text->length;
			continue;
		}
		value = load(record + op->at, op->width);
		if (op->nullable && !value)
			goto null;
		switch (op->kind) {
		case SIGNED:
			value = signed_of(value, op->width);
			if ((s64)value < 0) {
				*to++ = '-';
				value = -value;
			}
			break;
		case INSTANT:
			if (!to_unix(&value, offset_ns))
				return CANNOT;
			break;
		case MICROS:
			if (value >= MOST_NS)
				return CANNOT;
			to = put_micros(to, value);
			continue;
		}
		to = put_number(to, value);
		continue;
null:
		memcpy(to, "null", 4);
		to += 4;
	}
	*out = to;
	return DONE;
}

/*
 * Writes records as lines, from `progress` on. Returns DONE, or why it stopped. FULL: `out` is
 * full. UNKNOWN: call codec_learn() for a block's value first. CANNOT: Python must write the next.
 */
int lines(struct codec *const *codecs, const u8 *records, const u8 *sources, u64 count,
	  s64 offset_ns, u8 *out, u64 size, struct progress *progress)
{
	u8 *to = out + progress->written;

	while (progress->next < count) {
		const struct codec *codec = codecs[sources[progress->next]];
		int status =
			line(codec, records + progress->at, offset_ns, &to, out + size, progress);

		progress->written = to - out;
		if (status != DONE)
			return status;
		progress->next++;
		progress->at += codec->size;
	}
	return DONE;
}

/* --- slim rows */

#define NULL_NUMBER INT64_MIN
#define NO_FIELD (INT64_MIN + 1)
#define SLIM_BLOCKS 2 /* those that have ids */

static int slim_row(const struct codec *codec, const u8 *record, s64 offset_ns, s64 *to,
		    struct progress *progress)
{
	const u8 *meaning[SLIM_BLOCKS];
	int found = find_meanings(codec, SLIM_BLOCKS, record, meaning, progress);

	if (found != DONE)
		return found;
	for (u32 i = 0; i < codec->columns; i++) {
		const struct op *op = &codec->column[i];
		u64 value;

		if (op->kind == ABSENT) {
			to[i] = NO_FIELD;
			continue;
		}
		if (op->kind <= CHOICE) {
			bool other = op->kind == CHOICE && !load(record + op->at, 4);

			to[i] = load(meaning[op->block] + 4 * (other ? op->other : op->text), 4);
			continue;
		}
		value = load(record + op->at, op->width);
		if ((op->has && !(record[codec->has_at] & op->has)) || (op->nullable && !value)) {
			to[i] = NULL_NUMBER;
			continue;
		}
		if (op->kind == SIGNED) {
			to[i] = signed_of(value, op->width);
			continue;
		}
		if (op->kind == INSTANT && !to_unix(&value, offset_ns))
			return CANNOT;
		if (value >> 63)
			return CANNOT;
		to[i] = value;
	}
	return DONE;
}

/*
 * Makes slim rows of records, from `progress` on; behind the numbers of each is the offset of its
 * record. Returns DONE, or why it stopped: UNKNOWN as
 * lines() does; CANNOT: a number of the next one has not room in 63 bits.
 */
int slim_rows(struct codec *const *codecs, const u8 *records, const u8 *sources, u64 count,
	      s64 offset_ns, s64 *numbers, struct progress *progress)
{
	while (progress->next < count) {
		const struct codec *codec = codecs[sources[progress->next]];
		s64 *row = numbers + progress->next * (codec->columns + 1);
		int status = slim_row(codec, records + progress->at, offset_ns, row, progress);

		if (status != DONE)
			return status;
		row[codec->columns] = progress->at;
		progress->next++;
		progress->at += codec->size;
	}
	return DONE;
}
