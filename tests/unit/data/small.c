/*
 * The source of small.btf: every shape of type that the kernel is known to have. Made with
 *   clang -g -O2 -target bpf -c small.c -o small.o
 *   llvm-objcopy --dump-section .BTF=small.btf small.o
 */

/* Types as a table. */
/* clang-format off */

typedef unsigned int u32;
typedef unsigned long long u64;
typedef _Bool bool;
typedef struct { int counter; } atomic_t;
typedef struct { } empty_t;
typedef int (*compare_t)(const void *, const void *);

enum color { RED = 1, GREEN, BLUE = -7 };

struct opaque;

struct list { struct list *next, *prev; };

struct bits {
	u32 a : 3;
	u32 b : 7;
	unsigned short c : 5;
	unsigned char d;
	u64 e : 40;
	int f : 20;
};

struct __attribute__((packed)) packed {
	unsigned char kind;
	u64 when;
	unsigned short port;
};

/* Packed for one reason each: the size, an offset, a bit-field across its unit. */
struct __attribute__((packed)) packed_size { u32 a; unsigned char b; };
struct __attribute__((packed)) packed_offset { unsigned char a; u32 b; unsigned char c[3]; };
struct __attribute__((packed)) packed_bits { u32 a : 20; u32 b : 20; unsigned char c[3]; };

struct aligned {
	u32 first;
	u32 on_its_own_line __attribute__((aligned(64)));
	char last;
} __attribute__((aligned(64)));

struct bpf_insn { unsigned char code; int imm; };

struct outer {
	struct list list;
	union {
		struct {
			u32 daddr;
			u32 saddr;
		};
		u64 pair;
		struct { char deep; } named[2];
	};
	atomic_t refs[2][3];
	empty_t lock;
	enum color color;
	bool on : 1, off : 1;
	volatile const u32 seen;
	struct opaque *where;
	union later *later;
	struct bits bits;
	struct aligned aligned;
	struct packed packed;
	compare_t compare;
	int (*table)[4];
	const char *const *names;
	unsigned __int128 wide;
	double real;
	struct bpf_insn insn;
	u32 tagged __attribute__((btf_decl_tag("tagged")));
	int __attribute__((btf_type_tag("user"))) *user;
	u64 flexible[];
};

typedef void (*btf_trace_hello)(void *, const struct outer *, int, enum color, char *const);

btf_trace_hello hello;
volatile struct aligned counters;
struct packed_size packed_size;
struct packed_offset packed_offset;
struct packed_bits packed_bits;

int takes(struct outer *o, const char *name)
{
	hello((void *)0, o, 1, RED, (void *)0);
	return o->color + name[0] + counters.first + packed_size.b +
	       packed_offset.b + packed_bits.b;
}
