// Package table holds the outputs of the pipeline's stages: keyed sets of finished values that know what changed since
// they were last drained, and indices over them. A value that is set again unchanged is no change. Tables belong to one
// goroutine.
package table

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
)

// Table is a keyed set of values. The values are shared and must not be changed once set.
type Table[K comparable, V any] struct {
	rows    map[K]V
	changed map[K]struct{}
	indices []interface{ replace(key K, old, new *V) }
}

// New makes an empty table.
func New[K comparable, V any]() *Table[K, V] {
	return &Table[K, V]{rows: map[K]V{}, changed: map[K]struct{}{}}
}

// Get finds a value.
func (t *Table[K, V]) Get(key K) (V, bool) {
	v, ok := t.rows[key]
	return v, ok
}

// Len is the number of values.
func (t *Table[K, V]) Len() int { return len(t.rows) }

// All is every row; it must not be changed.
func (t *Table[K, V]) All() map[K]V { return t.rows }

// Set adds or replaces a value and tells whether that changed anything.
func (t *Table[K, V]) Set(key K, value V) bool {
	old, exists := t.rows[key]
	if exists && reflect.DeepEqual(old, value) {
		return false
	}
	var before *V
	if exists {
		before = &old
	}
	t.rows[key] = value
	t.note(key, before, &value)
	return true
}

// Delete takes a value out and tells whether it was there.
func (t *Table[K, V]) Delete(key K) bool {
	old, exists := t.rows[key]
	if !exists {
		return false
	}
	delete(t.rows, key)
	t.note(key, &old, nil)
	return true
}

func (t *Table[K, V]) note(key K, old, new *V) {
	t.changed[key] = struct{}{}
	for _, index := range t.indices {
		index.replace(key, old, new)
	}
}

// Drain is what changed since the last time: the values that are there now, and the keys of those that are gone.
func (t *Table[K, V]) Drain() (updated map[K]V, removed []K) {
	updated = make(map[K]V, len(t.changed))
	for key := range t.changed {
		if v, ok := t.rows[key]; ok {
			updated[key] = v
		} else {
			removed = append(removed, key)
		}
	}
	clear(t.changed)
	return updated, removed
}

// Index finds the rows of a table by something else than their key.
type Index[I, K comparable, V any] struct {
	table *Table[K, V]
	of    func(V) []I
	keys  map[I]map[K]struct{}
}

// NewIndex adds an index to an empty table; of says under what a value is found.
func NewIndex[I, K comparable, V any](t *Table[K, V], of func(V) []I) *Index[I, K, V] {
	index := &Index[I, K, V]{table: t, of: of, keys: map[I]map[K]struct{}{}}
	t.indices = append(t.indices, index)
	return index
}

func (x *Index[I, K, V]) replace(key K, old, new *V) {
	if old != nil {
		for _, i := range x.of(*old) {
			delete(x.keys[i], key)
			if len(x.keys[i]) == 0 {
				delete(x.keys, i)
			}
		}
	}
	if new != nil {
		for _, i := range x.of(*new) {
			if x.keys[i] == nil {
				x.keys[i] = map[K]struct{}{}
			}
			x.keys[i][key] = struct{}{}
		}
	}
}

// Keys are the keys of the rows found under i, in no order.
func (x *Index[I, K, V]) Keys(i I) []K { return slices.Collect(maps.Keys(x.keys[i])) }

// Values are the rows found under i, in no order.
func (x *Index[I, K, V]) Values(i I) []V {
	out := make([]V, 0, len(x.keys[i]))
	for key := range x.keys[i] {
		out = append(out, x.table.rows[key])
	}
	return out
}

// Sorted are the rows found under i in the order of their keys, for keys that have one.
func Sorted[I comparable, K cmp.Ordered, V any](x *Index[I, K, V], i I) []V {
	keys := slices.Sorted(maps.Keys(x.keys[i]))
	out := make([]V, len(keys))
	for n, key := range keys {
		out[n] = x.table.rows[key]
	}
	return out
}
