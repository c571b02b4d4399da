// SPDX-License-Identifier: MIT
/*
 * Reads JSON lines as records.c writes them: the numbers, and which texts are between them.
 *
 * As records.c, it knows no schema. Python passes the parts of a line (struct part). A text, such as
 * the addresses of a row, becomes its number in a list: Python checks each text once. A line of any
 * other form is left to Python.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

/* --- texts, each once */

#define MOST_TEXTS 16384
#define SLOTS (4 * MOST_TEXTS)

struct text {
	u64 hash;
	u32 at, length;
};

struct reader {
	u32 *slots; /* index of a text + 1, by hash; 0: none */
	struct text *texts;
	u32 count;
	u8 *bytes;
	u64 used, room;
};

void reader_free(struct reader *reader)
{
	free(reader->slots);
	free(reader->texts);
	free(reader->bytes);
	free(reader);
}

struct reader *reader_new(void)
{
	struct reader *reader = calloc(1, sizeof(*reader));

	if (!reader)
		return NULL;
	reader->slots = calloc(SLOTS, sizeof(*reader->slots));
	reader->texts = calloc(MOST_TEXTS, sizeof(*reader->texts));
	if (!reader->slots || !reader->texts) {
		reader_free(reader);
		return NULL;
	}
	return reader;
}

/* Forgets all texts: numbers begin at 0 again. */
void reader_forget(struct reader *reader)
{
	memset(reader->slots, 0, SLOTS * sizeof(*reader->slots));
	reader->count = 0;
	reader->used = 0;
}

static u64 hash_of(const u8 *text, u64 length)
{
	u64 hash = length, word;

	for (; length >= 8; text += 8, length -= 8) {
		memcpy(&word, text, 8);
		hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
		hash ^= hash >> 32;
	}
	word = 0;
	memcpy(&word, text, length);
	hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
	return hash ^ hash >> 32;
}

/* The number of a text, which is added if it is new; -1 without room. */
static s64 number_of(struct reader *reader, const u8 *text, u64 length)
{
	u64 hash = hash_of(text, length);
	struct text *one;
	u32 *slot;

	for (u32 at = hash;; at++) {
		slot = &reader->slots[at % SLOTS];
		if (!*slot)
			break;
		one = &reader->texts[*slot - 1];
		if (one->hash == hash && one->length == length &&
		    !memcmp(reader->bytes + one->at, text, length))
			return *slot - 1;
	}
	if (reader->count == MOST_TEXTS)
		return -1;
	if (reader->room - reader->used < length) {
		u64 wanted = 2 * reader->room + length + 4096;
		u8 *grown = wanted >> 32 ? NULL : realloc(reader->bytes, wanted);

		if (!grown)
			return -1;
		reader->bytes = grown;
		reader->room = wanted;
	}
	reader->texts[reader->count] = (struct text){hash, reader->used, length};
	memcpy(reader->bytes + reader->used, text, length);
	reader->used += length;
	*slot = ++reader->count;
	return *slot - 1;
}

/* --- lines */

enum kind { COUNT, NULLABLE, SIGNED, MICROS, TEXT, LAST };

#define UNKNOWN INT64_MIN       /* null */
#define MISSING (INT64_MIN + 1) /* the row has no such field */
#define NOWHERE 0xff
#define LONGEST_LITERAL 251
/* So long a line may be, as in capture/rows.py. */
#define LONGEST_LINE 4096

/*
 * A part of a line: its literal text, and what follows.
 *
 * COUNT, NULLABLE, SIGNED, MICROS: an integer, that or null, that or a negative one, and null or a
 * number with one to three decimals. TEXT: all up to the next part's literal, of which it has its
 * own reader. LAST: the end of the line. `to`: the column of the result; NOWHERE for none. `skip`:
 * bytes of the literal before the value; what follows of it is looked at, and belongs to the value.
 */
struct part {
	u8 kind, to, length, skip;
	u8 literal[LONGEST_LITERAL + 1]; /* 256 bytes in all */
};

/* The parts of the lines of one probe, or of one version of its fields. */
struct form {
	u32 count;
	const struct part *parts;
};

/* An integer without leading zeros that fits into 63 bits; NULL for anything else. */
static const u8 *integer(const u8 *at, s64 *value)
{
	const u8 *begin = at;
	u64 found = 0;

	while ((u8)(*at - '0') < 10)
		found = found * 10 + (*at++ - '0');
	if (at == begin || at - begin > 19 || (*begin == '0' && at - begin > 1) ||
	    found > INT64_MAX)
		return NULL;
	*value = found;
	return at;
}

static const u8 *number(const u8 *at, const u8 *end, u8 kind, s64 *value)
{
	if (kind != COUNT && end - at >= 4 && !memcmp(at, "null", 4)) {
		*value = UNKNOWN;
		return at + 4;
	}
	if (kind == SIGNED && *at == '-') {
		at = integer(at + 1, value);
		*value = -*value;
		return at && *value ? at : NULL;
	}
	at = integer(at, value);
	if (!at || kind != MICROS)
		return at;
	/* As put_micros() writes them; of at most 15 digits the text is the shortest one. */
	if (*value >= 1000000000000 || *at++ != '.')
		return NULL;
	for (u32 count = 0;; at++, count++) {
		if ((u8)(*at - '0') < 10) {
			if (count == 3)
				return NULL;
			continue;
		}
		return count && (count == 1 || at[-1] != '0') ? at : NULL;
	}
}

/* The first place of a literal, which begins with a comma, before `end`. */
static const u8 *find(const u8 *at, const u8 *end, const struct part *part)
{
	if (part->kind == LAST)
		return end - part->length;
	while (end - at >= part->length) {
		at = memchr(at, ',', end - at - part->length + 1);
		if (!at || !memcmp(at, part->literal, part->length))
			return at;
		at++;
	}
	return NULL;
}

static bool read_line(struct reader *const *readers, const struct form *form, const u8 *at,
		      const u8 *end, s64 *row)
{
	for (u32 i = 0; i < form->count; i++) {
		const struct part *part = &form->parts[i];
		const u8 *begin;
		s64 value;

		if (end - at < part->length || memcmp(at, part->literal, part->length))
			return false;
		at += part->skip;
		switch (part->kind) {
		case LAST:
			return at == end;
		case TEXT:
			begin = at;
			at = find(at, end, part + 1);
			if (!at || at <= begin)
				return false;
			value = number_of(readers[part->to], begin, at - begin);
			if (value < 0)
				return false;
			row[part->to] = value;
			break;
		default:
			at = number(at, end, part->kind, &value);
			if (!at)
				return false;
			if (part->to != NOWHERE)
				row[part->to] = value;
		}
	}
	return false;
}

/*
 * Reads whole lines, of `width` numbers each, and tries the forms for each of them, that of the
 * line before first. `most`: rows that there is room for. The last three numbers of a row are its
 * form, where its line begins, and where it ends; the first one is its time.
 *
 * `readers`: of each column that is a text's. Returns the number of rows; -1 if any line has
 * another form, or is too long.
 */
s64 read_lines(struct reader *const *readers, const struct form *forms, u32 count, const u8 *data,
	       u64 size, s64 *rows, u32 width, u64 most, u32 *ordered)
{
	const u8 *at = data, *end = data + size;
	u32 last = 0;
	u64 done = 0;

	*ordered = 1;

	for (; at < end; done++) {
		const u8 *stop = memchr(at, '\n', end - at);
		s64 *row = rows + done * width;
		u32 tried = 0;

		if (!stop || done == most || stop - at > LONGEST_LINE)
			return -1;
		for (; tried < count; tried++) {
			u32 form = (last + tried) % count;

			for (u32 i = 0; i < width; i++)
				row[i] = MISSING;
			if (read_line(readers, &forms[form], at, stop, row)) {
				last = form;
				break;
			}
		}
		if (tried == count)
			return -1;
		if (done && row[0] < row[-(s64)width])
			*ordered = 0;
		row[width - 3] = last;
		row[width - 2] = at - data;
		row[width - 1] = stop - data;
		at = stop + 1;
	}
	return done;
}

/* The text of a number. */
const u8 *reader_text(const struct reader *reader, u32 number, u32 *length)
{
	*length = reader->texts[number].length;
	return reader->bytes + reader->texts[number].at;
}

u32 reader_count(const struct reader *reader)
{
	return reader->count;
}
