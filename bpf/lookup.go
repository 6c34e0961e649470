package bpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

const (
	// numberPlaceholder is what lookup.c has in place of an instance's number.
	numberPlaceholder = 0x6661697266616972
	// spareInstances is how many are kept ready: as many as pods that a node of the usual size may start at once.
	spareInstances = 110
	// lull is how long no pod must have started before spare instances are made.
	lull = 300 * time.Millisecond
)

// lookups makes the pods' instances of the lookup program. To load one takes the kernel's verifier longer than all else that
// a pod's start needs; so they are loaded before, and told by a map which pod they are for.
type lookups struct {
	spec *ebpf.ProgramSpec
	// places are those of the number in the program.
	places []int
	// version stands for the program, whatever its number. An instance of another one is replaced.
	version   uint64
	instances *ebpf.Map
	// used wakes stock.
	used chan struct{}

	mu    sync.Mutex
	spare []instance
	// taken are the instances in use or spare, by number, and those in use of each network namespace; next is where to look
	// for a free number.
	taken map[uint32]connectInstance
	of    map[uint64][]uint32
	next  uint32
}

// instance is a program that is not attached yet.
type instance struct {
	number  uint32
	program *ebpf.Program
}

// newLookups prepares the program, and finds out which numbers earlier processes have given. The maps must stay open.
func newLookups(maps connectMaps) (*lookups, error) {
	collection, err := loadLookup()
	if err != nil {
		return nil, err
	}
	l := &lookups{
		spec: collection.Programs[lookupProgLookup], instances: maps.Instances, used: make(chan struct{}, 1),
		taken: map[uint32]connectInstance{}, of: map[uint64][]uint32{},
	}
	tag, err := l.spec.Tag()
	if err == nil {
		l.version, err = strconv.ParseUint(tag, 16, 64)
	}
	if err != nil {
		return nil, fmt.Errorf("identify the lookup program: %w", err)
	}
	if err := l.prepare(map[string]*ebpf.Map{
		lookupMapCounters: maps.Counters, lookupMapExcludedNetworks: maps.ExcludedNetworks, lookupMapExclusions: maps.Exclusions,
		lookupMapHostConfig: maps.HostConfig, lookupMapInstances: maps.Instances, lookupMapListeners: maps.Listeners, lookupMapPods: maps.Pods,
	}); err != nil {
		return nil, fmt.Errorf("prepare the lookup program: %w", err)
	}
	var number uint32
	var value connectInstance
	entries := l.instances.Iterate()
	for entries.Next(&number, &value) {
		if value.Netns != 0 {
			l.taken[number] = value
			l.of[value.Netns] = append(l.of[value.Netns], number)
		}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("list instances of the lookup program: %w", err)
	}
	return l, nil
}

// prepare gives the program its maps, and takes away its debug information, which would be loaded each time.
func (l *lookups) prepare(maps map[string]*ebpf.Map) error {
	bare := make(asm.Instructions, len(l.spec.Instructions))
	for i, ins := range l.spec.Instructions {
		bare[i] = asm.Instruction{OpCode: ins.OpCode, Dst: ins.Dst, Src: ins.Src, Offset: ins.Offset, Constant: ins.Constant}
		if ins.IsLoadFromMap() {
			m, ok := maps[ins.Reference()]
			if !ok {
				return fmt.Errorf("it has an unknown map %q", ins.Reference())
			}
			if err := bare[i].AssociateMap(m); err != nil {
				return err
			}
		} else if ins.OpCode == asm.LoadImmOp(asm.DWord) && ins.Constant == numberPlaceholder {
			l.places = append(l.places, i)
		}
	}
	if len(l.places) == 0 {
		return errors.New("it has no place for its number")
	}
	l.spec.Instructions = bare
	return nil
}

// take gives an instance for a network namespace. The caller closes its program.
func (l *lookups) take(cookie uint64) (instance, error) {
	select {
	case l.used <- struct{}{}:
	default:
	}
	i, ok := l.pop()
	if !ok {
		var err error
		if i, err = l.load(); err != nil {
			return i, err
		}
	}
	value := connectInstance{Netns: cookie, Version: l.version}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.instances.Put(i.number, value); err != nil {
		delete(l.taken, i.number)
		return i, errors.Join(fmt.Errorf("give an instance of the lookup program its namespace: %w", err), i.program.Close())
	}
	l.taken[i.number] = value
	l.of[cookie] = append(l.of[cookie], i.number)
	return i, nil
}

func (l *lookups) pop() (i instance, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := len(l.spare) - 1
	if last < 0 {
		return i, false
	}
	i, l.spare = l.spare[last], l.spare[:last]
	return i, true
}

// load loads an instance under a number that is free.
func (l *lookups) load() (instance, error) {
	number, err := l.number()
	if err != nil {
		return instance{}, err
	}
	spec := l.spec.Copy()
	for _, at := range l.places {
		spec.Instructions[at].Constant = int64(number)
	}
	program, err := ebpf.NewProgram(spec)
	if err != nil {
		l.release(number)
		return instance{}, fmt.Errorf("load the lookup program: %w", err)
	}
	return instance{number, program}, nil
}

// number finds a free number, and takes it. Those that were freed last come last.
func (l *lookups) number() (uint32, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range l.instances.MaxEntries() {
		number := l.next
		l.next = (l.next + 1) % l.instances.MaxEntries()
		if _, ok := l.taken[number]; !ok {
			l.taken[number] = connectInstance{}
			return number, nil
		}
	}
	return 0, errors.New("load the lookup program: there are more pods than numbers")
}

func (l *lookups) release(number uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.taken, number)
}

// free makes those numbers free that a network namespace has and drop says yes to. Their instances must not be attached.
func (l *lookups) free(cookie uint64, drop func(number uint32) bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var kept []uint32
	var errs []error
	for _, number := range l.of[cookie] {
		if !drop(number) {
			kept = append(kept, number)
		} else if err := l.instances.Put(number, connectInstance{}); err != nil {
			kept = append(kept, number)
			errs = append(errs, fmt.Errorf("free an instance of the lookup program: %w", err))
		} else {
			delete(l.taken, number)
		}
	}
	if l.of[cookie] = kept; len(kept) == 0 {
		delete(l.of, cookie)
	}
	return errors.Join(errs...)
}

// cookies are the network namespaces that have instances.
func (l *lookups) cookies() (all []uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for cookie := range l.of {
		all = append(all, cookie)
	}
	return all
}

// current tells whether a network namespace has an instance of the present version, and no other.
func (l *lookups) current(cookie uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.of[cookie]
	return len(own) > 0 && !slices.ContainsFunc(own, func(number uint32) bool { return l.taken[number].Version != l.version })
}

// stock keeps spare instances until ctx ends. It makes new ones while no pods start, with a fifth of a processor at most.
func (l *lookups) stock(ctx context.Context) error {
	next := time.NewTimer(lull)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.used:
			next.Reset(lull)
		case <-next.C:
			if !l.short() {
				continue // until one is used
			}
			began := time.Now()
			i, err := l.load()
			if err != nil {
				return err
			}
			l.mu.Lock()
			l.spare = append(l.spare, i)
			l.mu.Unlock()
			next.Reset(4 * time.Since(began))
		}
	}
}

func (l *lookups) short() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.spare) < spareInstances
}

// close gives up the spare instances.
func (l *lookups) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, i := range l.spare {
		errs = append(errs, i.program.Close())
	}
	l.spare = nil
	return errors.Join(errs...)
}

// Stock keeps what pods' starts need ready, so that they need not wait for it, until ctx ends.
func (n *Node) Stock(ctx context.Context) error { return n.lookups.stock(ctx) }

// ensureLookup has the present version of the program attached to the pod's network namespace.
func (n *Node) ensureLookup(ns *os.File, cookie uint64) error {
	if n.lookups.current(cookie) {
		if ok, err := n.captured(cookie); ok || err != nil {
			return err
		}
	}
	i, err := n.lookups.take(cookie)
	if err != nil {
		return err
	}
	defer i.program.Close()
	if err := n.attachLookup(ns, cookie, i.program); err != nil {
		return errors.Join(err, n.lookups.free(cookie, func(number uint32) bool { return number == i.number }))
	}
	return n.lookups.free(cookie, func(number uint32) bool { return number != i.number })
}

// attachLookup attaches the program to the pod's network namespace, in place of an older one if there is one.
func (n *Node) attachLookup(ns *os.File, cookie uint64, program *ebpf.Program) error {
	pin := n.podPath(cookie, lookupPin)
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		if attached(old) {
			return old.Update(program)
		}
		if err := old.Unpin(); err != nil {
			return fmt.Errorf("unpin a link to a namespace that is gone: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link: %w", err)
	}
	var made *link.NetNsLink
	err = withFD(ns, func(fd int) error {
		made, err = link.AttachNetNs(fd, program)
		return err
	})
	if err != nil {
		return fmt.Errorf("attach the lookup program: %w", err)
	}
	defer made.Close()
	return made.Pin(pin)
}

// attached tells whether a link's network namespace still exists.
func attached(l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	ns := info.NetNs()
	return ns != nil && ns.NetnsInode != 0
}

// captured tells whether the lookup program is attached to the pod's network namespace.
func (n *Node) captured(cookie uint64) (bool, error) {
	l, err := link.LoadPinnedLink(n.podPath(cookie, lookupPin), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pinned link: %w", err)
	}
	defer l.Close()
	return attached(l), nil
}
