package ztunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// configuration is where the store's content comes from: the control plane, or a file.
type configuration interface {
	// Run keeps the store current until ctx ends.
	Run(ctx context.Context) error
	// Synced is closed when the store holds the whole configuration for the first time.
	Synced() <-chan struct{}
}

// localConfiguration reads what the mesh knows from a file in the format of Istio's ztunnel (LOCAL_XDS_PATH), for a
// proxy that runs without a control plane. The file is read again when it changes; one that cannot be read or says
// something unknown leaves in force what was there before.
type localConfiguration struct {
	path      string
	text      string // the configuration itself (LOCAL_XDS), in place of a file
	clusterID string
	store     *state.Store
	log       *zap.Logger

	current state.Change
	content []byte
	synced  chan struct{}
	once    sync.Once
}

func newLocalConfiguration(cfg Config, store *state.Store, log *zap.Logger) *localConfiguration {
	return &localConfiguration{path: cfg.LocalXDSPath, text: cfg.LocalXDS, clusterID: cfg.ClusterID, store: store, log: log, synced: make(chan struct{})}
}

// Synced is closed when the file has been read once.
func (l *localConfiguration) Synced() <-chan struct{} { return l.synced }

// Run reads the file and follows it. The first reading must succeed.
func (l *localConfiguration) Run(ctx context.Context) error {
	if l.text != "" {
		if err := l.apply([]byte(l.text)); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", l.path, err)
	}
	defer watcher.Close()
	// The directory, because editors and ConfigMap mounts replace the file.
	if err := watcher.Add(filepath.Dir(l.path)); err != nil {
		return fmt.Errorf("watch %s: %w", l.path, err)
	}
	if err := l.read(); err != nil {
		return err
	}
	for {
		select {
		case <-watcher.Events:
			if err := l.read(); err != nil {
				l.log.Error("local configuration refused, the one before stays in force", zap.Error(err))
			}
		case err := <-watcher.Errors:
			l.log.Warn("watch local configuration", zap.String("path", l.path), zap.Error(err))
		case <-ctx.Done():
			return nil
		}
	}
}

// read applies the file's content if it is not what was read before.
func (l *localConfiguration) read() error {
	content, err := os.ReadFile(l.path)
	if err != nil {
		return fmt.Errorf("read local configuration: %w", err)
	}
	if l.content != nil && bytes.Equal(content, l.content) {
		return nil
	}
	return l.apply(content)
}

func (l *localConfiguration) apply(content []byte) error {
	change, err := parseLocal(content, l.clusterID)
	if err != nil {
		return fmt.Errorf("read local configuration %s: %w", l.path, err)
	}
	change.Removed, change.RemovedPolicies = gone(l.current, change)
	l.store.Apply(change)
	l.current, l.content = change, content
	l.once.Do(func() { close(l.synced) })
	l.log.Info("local configuration read", zap.Int("workloads", len(change.Workloads)),
		zap.Int("services", len(change.Services)), zap.Int("policies", len(change.Policies)))
	return nil
}

// gone names what the file held before and holds no more.
func gone(before, now state.Change) (resources, policies []string) {
	kept := map[string]bool{}
	for _, w := range now.Workloads {
		kept[w.UID] = true
	}
	for _, s := range now.Services {
		kept[s.Key().String()] = true
	}
	for _, w := range before.Workloads {
		if !kept[w.UID] {
			resources = append(resources, w.UID)
		}
	}
	for _, s := range before.Services {
		if key := s.Key().String(); !kept[key] {
			resources = append(resources, key)
		}
	}
	kept = map[string]bool{}
	for _, p := range now.Policies {
		kept[p.Key()] = true
	}
	for _, p := range before.Policies {
		if !kept[p.Key()] {
			policies = append(policies, p.Key())
		}
	}
	return resources, policies
}

// parseLocal reads a local file. A field or value that is not known is an error, because it may be what protects.
func parseLocal(content []byte, clusterID string) (state.Change, error) {
	var file localFile
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	decoder.KnownFields(true)
	switch err := decoder.Decode(&file); {
	case errors.Is(err, io.EOF):
		// More likely a file that is being written than a mesh without workloads, which `workloads: []` says.
		return state.Change{}, errors.New("nothing in it")
	case err != nil:
		return state.Change{}, err
	}
	var change state.Change
	var errs []error
	for i := range file.Workloads {
		w, err := file.Workloads[i].model(clusterID)
		if err != nil {
			errs = append(errs, fmt.Errorf("workload %s/%s: %w", file.Workloads[i].Namespace, file.Workloads[i].Name, err))
			continue
		}
		change.Workloads = append(change.Workloads, w)
	}
	for i := range file.Services {
		s, err := file.Services[i].model()
		if err != nil {
			errs = append(errs, fmt.Errorf("service %s/%s: %w", file.Services[i].Namespace, file.Services[i].Name, err))
			continue
		}
		change.Services = append(change.Services, s)
	}
	for i := range file.Policies {
		p, err := file.Policies[i].model()
		if err != nil {
			errs = append(errs, fmt.Errorf("policy %s/%s: %w", file.Policies[i].Namespace, file.Policies[i].Name, err))
			continue
		}
		change.Policies = append(change.Policies, p)
	}
	return change, errors.Join(errs...)
}

// podUID is how this proxy knows a pod of its cluster. The uids of local files are written by hand in several forms, and
// Istio's ztunnel finds a pod by its name whatever its uid, so the form is set right here.
func podUID(clusterID string, w *mesh.Workload) string {
	return clusterID + "//Pod/" + w.Namespace + "/" + w.Name
}
