// Package install (plumbing) puts the CNI plugin on a node and into the node's CNI configuration, keeps it there when
// others rewrite the configuration, and takes it out again.
//
// A container runtime uses the first configuration by file name; the plugin becomes the last of that one's list.
// Ensure and Remove are idempotent; Run calls Ensure whenever something changed.
//
// Next: cni/plugin/plugin.go
package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

const (
	// recheck is how often the node is looked at even when no change was reported.
	recheck = 30 * time.Second
	// settle is how long Run waits after a change: who rewrites a configuration rarely does it in one step.
	settle = 5 * time.Millisecond
	// replaced is added to the name of a single-plugin configuration that a list took the place of; runtimes do not
	// read files of that name.
	replaced = ".fairlead-replaced"
)

// Config says what goes where. Paths are as this process sees them.
type Config struct {
	// Binary is the plugin to copy.
	Binary string
	// BinDir and ConfDir are where the runtime looks for plugins and configurations.
	BinDir  string
	ConfDir string
	// EventSocket is the agent's socket as the plugin, which runs on the host, sees it; empty: the plugin's default.
	EventSocket string
	// Record is the agent's record of the mesh as the plugin sees it; empty: there is none.
	Record string
	// Access is the plugin's access to the API server as the plugin sees it; empty: it asks nobody but the agent.
	Access string
	// ExcludeNamespaces are those whose pods start without the agent.
	ExcludeNamespaces []string
	Log               *zap.Logger
}

// Installer keeps the plugin installed.
type Installer struct {
	cfg Config

	mu  sync.Mutex
	err error // why the plugin is not installed now, nil when it is
}

// New makes an installer; nothing is done until Run.
func New(cfg Config) *Installer {
	return &Installer{cfg: cfg, err: errors.New("the CNI plugin is not installed yet")}
}

// Ready tells why pods would start without the plugin, or nil.
func (i *Installer) Ready() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.err
}

// Run installs the plugin and keeps it installed until ctx ends, and leaves it: a pod of the mesh that starts without
// an agent must be refused. A node without a configuration yet is waited for.
func (i *Installer) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch CNI directories: %w", err)
	}
	defer watcher.Close()
	for {
		for _, dir := range []string{i.cfg.BinDir, i.cfg.ConfDir} {
			// One that is missing, or was made anew, is taken up at the next round.
			_ = watcher.Add(dir)
		}
		i.note(Ensure(i.cfg))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recheck):
		case err := <-watcher.Errors:
			i.cfg.Log.Warn("watch CNI directories", zap.Error(err))
		case <-watcher.Events:
			if !drain(ctx, watcher.Events) {
				return nil
			}
		}
	}
}

// drain waits until no event came for a while; false when ctx ended meanwhile.
func drain(ctx context.Context, events <-chan fsnotify.Event) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-events:
		case <-time.After(settle):
			return true
		}
	}
}

// note keeps Ensure's outcome for Ready, and logs when it changes.
func (i *Installer) note(changed []string, err error) {
	i.mu.Lock()
	before := i.err
	i.err = err
	i.mu.Unlock()
	if len(changed) > 0 {
		i.cfg.Log.Info("installed the CNI plugin", zap.Strings("files", changed))
	}
	if err != nil && (before == nil || before.Error() != err.Error()) {
		i.cfg.Log.Warn("the CNI plugin is not in force", zap.Error(err))
	}
}

// Ensure makes the plugin's binary and configuration entry as they should be, and names the files it had to write.
func Ensure(cfg Config) (changed []string, err error) {
	binary := filepath.Join(cfg.BinDir, plugin.Type)
	copied, err := ensureBinary(cfg.Binary, binary)
	if err != nil {
		return nil, err
	}
	if copied {
		changed = append(changed, binary)
	}
	// The entry comes after the binary it names.
	entry, err := configEntry(cfg)
	if err != nil {
		return changed, err
	}
	active, others, err := configurations(cfg.ConfDir)
	if err != nil {
		return changed, err
	}
	written, err := ensureEntry(active, entry)
	if err != nil {
		return changed, fmt.Errorf("add the plugin to %s: %w", active, err)
	}
	if written != "" {
		changed = append(changed, written)
	}
	for _, path := range others {
		if removed, err := removeEntry(path); err == nil && removed {
			changed = append(changed, path)
		}
	}
	return changed, nil
}

// Remove takes the plugin out of all configurations, and then from the node. What was changed becomes what it was.
func Remove(cfg Config) error {
	active, others, err := configurations(cfg.ConfDir)
	if err != nil && !errors.Is(err, errNoConfiguration) {
		return err
	}
	var errs []error
	for _, path := range append(others, active) {
		if path == "" {
			continue
		}
		if _, err := removeEntry(path); err != nil {
			errs = append(errs, fmt.Errorf("take the plugin out of %s: %w", path, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // a runtime that finds an entry without a binary starts no pod at all
	}
	if err := os.Remove(filepath.Join(cfg.BinDir, plugin.Type)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// configEntry is the plugin's entry in a configuration list.
func configEntry(cfg Config) ([]byte, error) {
	return json.Marshal(struct {
		Type              string   `json:"type"`
		EventSocket       string   `json:"eventSocket,omitempty"`
		Record            string   `json:"record,omitempty"`
		Access            string   `json:"apiAccess,omitempty"`
		ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`
	}{plugin.Type, cfg.EventSocket, cfg.Record, cfg.Access, cfg.ExcludeNamespaces})
}

var errNoConfiguration = errors.New("no CNI configuration yet: the cluster's network plugin is not installed")

// configurations are the files a runtime reads: the first by name, which is in force, and the others.
func configurations(dir string) (active string, others []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("%s: %w", dir, errNoConfiguration)
	}
	if err != nil {
		return "", nil, err
	}
	var paths []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".conf" || ext == ".conflist" || ext == ".json") {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	if len(paths) == 0 {
		return "", nil, fmt.Errorf("%s: %w", dir, errNoConfiguration)
	}
	slices.Sort(paths)
	return paths[0], paths[1:], nil
}

// ensureEntry makes the plugin the last of a configuration, and names the file it wrote, if it did.
func ensureEntry(path string, entry []byte) (written string, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if filepath.Ext(path) != ".conflist" {
		return replaceByList(path, text, entry)
	}
	l, err := parseList(text)
	if err != nil {
		return "", err
	}
	next, err := l.with(plugin.Type, entry)
	if err != nil {
		return "", err
	}
	if bytes.Equal(text, next) {
		return "", nil
	}
	return path, writeLike(path, path, next)
}

// replaceByList makes a list of a single-plugin configuration, and sets that aside under another name.
func replaceByList(path string, text, entry []byte) (written string, err error) {
	whole, err := listOf(text)
	if err != nil {
		return "", err
	}
	l, err := parseList(whole)
	if err != nil {
		return "", err
	}
	next, err := l.with(plugin.Type, entry)
	if err != nil {
		return "", err
	}
	listPath := strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist"
	if err := writeLike(path, listPath, next); err != nil {
		return "", err
	}
	return listPath, os.Rename(path, path+replaced)
}

// removeEntry takes the plugin out of a configuration, and tells whether it was in it. A list that had taken the place
// of a single-plugin configuration makes way for it again.
func removeEntry(path string) (bool, error) {
	if filepath.Ext(path) != ".conflist" {
		return false, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	l, err := parseList(text)
	if err != nil {
		return false, err
	}
	if l.count(plugin.Type) == 0 {
		return false, nil
	}
	for _, ext := range []string{".conf", ".json"} {
		single := strings.TrimSuffix(path, ".conflist") + ext
		if _, err := os.Stat(single + replaced); err != nil {
			continue
		}
		if err := os.Rename(single+replaced, single); err != nil {
			return false, err
		}
		return true, os.Remove(path)
	}
	return true, writeLike(path, path, l.without(plugin.Type))
}

// ensureBinary copies a program where it differs, and tells whether it did.
func ensureBinary(from, to string) (bool, error) {
	want, err := os.ReadFile(from)
	if err != nil {
		return false, fmt.Errorf("read the CNI plugin: %w", err)
	}
	if have, err := os.ReadFile(to); err == nil && bytes.Equal(have, want) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	if err := writeAtomic(to, want, 0o755); err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	return true, nil
}

// writeLike writes a file with the mode of another.
func writeLike(like, path string, content []byte) error {
	info, err := os.Stat(like)
	if err != nil {
		return err
	}
	return writeAtomic(path, content, info.Mode().Perm())
}

// writeAtomic replaces a file as a whole: a reader, or a runtime that executes it, has the old one or the new one.
func writeAtomic(path string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".fairlead-*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is none of that name
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
