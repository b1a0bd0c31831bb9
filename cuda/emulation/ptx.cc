// Reading PTX: files, kernels, statements.
#include "cuda/emulation/ptx.h"

#include <dlfcn.h>
#include <elf.h>

#include <cctype>
#include <fstream>
#include <sstream>
#include <unordered_map>

#include "cuda/emulation/ptx_machine.h"

namespace fastpage::cuda::emulation {

namespace {

struct Variable {
  size_t bytes, alignment;
  bool dynamic;
};

struct File {
  std::string text;
  std::map<std::string, Variable> shared;  // of the whole file
};

struct Place {
  const File* file;
  size_t begin, end;  // of the kernel, from ".entry"
};

std::vector<std::unique_ptr<File>> files;
std::map<std::string, Place> places;
std::map<std::string, std::unique_ptr<PtxKernel>> kernels;
std::map<std::string, PtxCounts> counts;

std::string read_whole(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return "";
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1));
}

// Every compiler has a name of its own for an anonymous namespace, with its length before it.
std::string without_anonymous_names(const std::string& symbol) {
  const std::string mark = "_GLOBAL__N_";
  std::string result;
  for (size_t at = 0;;) {
    const size_t found = symbol.find(mark, at);
    if (found == std::string::npos) return result + symbol.substr(at);
    size_t digits = found;
    while (digits > at && std::isdigit(static_cast<unsigned char>(symbol[digits - 1]))) --digits;
    result += symbol.substr(at, digits - at) + "N";
    at = found + std::stoul(symbol.substr(digits, found - digits));
  }
}

// .shared .align 4 .b8 name[32]; the size in [] is missing of dynamic shared memory.
std::pair<std::string, Variable> parse_shared(const std::string& statement) {
  std::istringstream words(statement);
  std::string word;
  Variable v{0, 1, false};
  size_t element = 1;
  while (words >> word) {
    if (word == ".align") {
      words >> v.alignment;
    } else if (word[0] == '.' && word.size() > 2 &&
               std::isdigit(static_cast<unsigned char>(word[2]))) {
      element = std::stoul(word.substr(2)) / 8;
    } else if (word[0] != '.') {
      const size_t bracket = word.find('[');
      v.bytes = element;
      if (bracket != std::string::npos) {
        v.dynamic = word[bracket + 1] == ']';
        v.bytes = v.dynamic ? 0 : element * std::stoul(word.substr(bracket + 1));
      }
      return {word.substr(0, bracket), v};
    }
  }
  throw std::runtime_error("not understood: " + statement);
}

void read_file(const std::string& path) {
  files.push_back(std::make_unique<File>());
  File& file = *files.back();
  file.text = read_whole(path);
  for (size_t at = 0; at < file.text.size();) {
    const size_t end = std::min(file.text.find('\n', at), file.text.size());
    const std::string line = file.text.substr(at, end - at);
    if (line.find(".shared") == 0 || line.find(".extern .shared") == 0) {
      file.shared.insert(parse_shared(line.substr(0, line.find(';'))));
    }
    const size_t entry = line.find(".entry ");
    if (entry != std::string::npos && line.find("//") == std::string::npos) {
      const std::string name = trimmed(line.substr(entry + 7, line.find('(') - entry - 7));
      const size_t last = file.text.find("\n}", at);
      places[without_anonymous_names(name)] = {&file, at, last};
      at = last;
      continue;
    }
    at = end + 1;
  }
}

struct Statement {
  std::string guard;  // a predicate, "!" before it if negated
  std::vector<std::string> words;
  std::vector<std::vector<std::string>> operands;
  std::string text;
};

std::vector<std::string> split(std::string_view text, char at) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size() && (text[i] == '{' || text[i] == '[')) ++depth;
    if (i < text.size() && (text[i] == '}' || text[i] == ']')) --depth;
    if (i == text.size() || (text[i] == at && depth == 0)) {
      parts.push_back(trimmed(text.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  return parts;
}

Statement parse_statement(const std::string& text) {
  Statement s;
  s.text = text;
  std::string rest = text;
  if (rest[0] == '@') {
    const size_t space = rest.find_first_of(" \t");
    s.guard = rest.substr(1, space - 1);
    rest = trimmed(rest.substr(space));
  }
  const size_t space = std::min(rest.find_first_of(" \t"), rest.size());
  s.words = split(rest.substr(0, space), '.');
  const std::string operands = trimmed(rest.substr(space));
  if (operands.empty()) return s;
  for (const std::string& operand : split(operands, ',')) {
    s.operands.push_back(operand[0] == '{' ? split(operand.substr(1, operand.size() - 2), ',')
                                           : std::vector<std::string>{operand});
  }
  return s;
}

class Parser {
 public:
  Parser(std::string name, const Place& place) : place_(place), shared_(place.file->shared) {
    kernel_ = std::make_unique<PtxKernel>();
    kernel_->name = std::move(name);
  }

  std::unique_ptr<PtxKernel> parse() {
    const std::string text = place_.file->text.substr(place_.begin, place_.end - place_.begin);
    const size_t body = text.find("\n{");
    parse_head(text.substr(0, body));
    parse_body(text.substr(body + 2));
    std::unordered_map<std::string, int> targets;
    for (const auto& [at, names] : labels_) {
      for (const std::string& name : names) targets[name] = static_cast<int>(at);
    }
    for (const Statement& s : statements_) {
      Operands op{s.words, s.operands,
                  [this](const std::string& word) { return register_of(word); }};
      Instruction instruction = make_instruction(op);
      instruction.text = s.text;
      if (!s.guard.empty()) {
        instruction.negated = s.guard[0] == '!';
        instruction.predicate = register_of(s.guard.substr(instruction.negated ? 1 : 0));
      }
      if (instruction.kind == Instruction::Kind::kBranch) {
        instruction.target = targets.at(s.operands.at(0).at(0));
      }
      kernel_->code.push_back(std::move(instruction));
    }
    place_shared();
    return std::move(kernel_);
  }

 private:
  void parse_head(const std::string& text) {
    std::istringstream lines(text);
    std::string line;
    while (std::getline(lines, line)) {
      std::istringstream words(line);
      std::string word;
      words >> word;
      if (word == ".maxntid") words >> kernel_->max_threads;
      if (word != ".param") continue;
      size_t alignment = 0, bytes = 0;
      std::string name;
      while (words >> word) {
        if (word == ".align") {
          words >> alignment;
        } else if (word[0] == '.') {
          bytes = std::stoul(word.substr(2)) / 8;
        } else {
          name = word.substr(0, word.find_first_of(",["));
          const size_t bracket = word.find('[');
          if (alignment == 0) alignment = bytes;
          if (bracket != std::string::npos) bytes *= std::stoul(word.substr(bracket + 1));
        }
      }
      const size_t offset = (kernel_->param_bytes + alignment - 1) / alignment * alignment;
      kernel_->param_offsets.push_back(offset);
      kernel_->param_sizes.push_back(bytes);
      kernel_->param_bytes = offset + bytes;
      constants_[name] = offset;
    }
  }

  void parse_body(const std::string& text) {
    std::istringstream lines(text);
    std::string line;
    while (std::getline(lines, line)) {
      line = trimmed(line.substr(0, line.find("//")));
      // Scopes of assembler within C++: their names do not meet.
      while (!line.empty() && (line[0] == '{' || line[0] == '}')) line = trimmed(line.substr(1));
      const size_t colon = line.find(':');
      if (colon != std::string::npos && line.find_first_of(" \t") > colon) {
        labels_[statements_.size()].push_back(line.substr(0, colon));
        continue;
      }
      while (!line.empty()) {
        const size_t end = line.find(';');
        if (end == std::string::npos) throw std::runtime_error("not understood: " + line);
        const std::string statement = trimmed(line.substr(0, end));
        line = trimmed(line.substr(end + 1));
        if (line == "}") line.clear();
        if (statement.empty()) continue;
        if (statement[0] != '.') {
          statements_.push_back(parse_statement(statement));
        } else if (statement.find(".shared") == 0) {
          shared_.insert(parse_shared(statement));
        } else if (statement.find(".reg") != 0 && statement.find(".pragma") != 0) {
          throw std::runtime_error("not understood: " + statement);
        }
      }
    }
  }

  int new_register() { return kernel_->num_registers++; }

  int constant(uint64_t value) {
    kernel_->constants.push_back({new_register(), value});
    return kernel_->constants.back().reg;
  }

  int register_of(const std::string& word) {
    const auto found = registers_.find(word);
    if (found != registers_.end()) return found->second;
    const int reg = make_register(word);
    registers_[word] = reg;
    return reg;
  }

  int make_register(const std::string& word) {
    if (word.rfind("0f", 0) == 0 || word.rfind("0d", 0) == 0) {
      return constant(std::stoull(word.substr(2), nullptr, 16));
    }
    if (std::isdigit(static_cast<unsigned char>(word[0])) || word[0] == '-') {
      return constant(word[0] == '-' ? static_cast<uint64_t>(std::stoll(word, nullptr, 0))
                                     : std::stoull(word, nullptr, 0));
    }
    const auto known = constants_.find(word);
    if (known != constants_.end()) return constant(known->second);
    const auto variable = shared_.find(word);
    if (variable != shared_.end()) {
      const int reg = new_register();
      used_.emplace_back(reg, variable->second);
      return reg;
    }
    const int reg = new_register();
    for (const char* special : {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid"}) {
      if (word.rfind(special, 0) == 0) kernel_->specials[word] = reg;
    }
    return reg;
  }

  void place_shared() {
    size_t bytes = 0;
    for (const auto& [reg, variable] : used_) {
      if (variable.dynamic) continue;
      bytes = (bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
      kernel_->constants.push_back({reg, bytes});
      bytes += variable.bytes;
    }
    for (const auto& [reg, variable] : used_) {
      if (!variable.dynamic) continue;
      bytes = (bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
      kernel_->constants.push_back({reg, bytes});
    }
    kernel_->static_shared = bytes;
  }

  const Place& place_;
  std::unique_ptr<PtxKernel> kernel_;
  std::map<std::string, Variable> shared_;
  std::vector<Statement> statements_;
  std::map<size_t, std::vector<std::string>> labels_;  // by the statement that follows
  std::unordered_map<std::string, int> registers_;
  std::unordered_map<std::string, uint64_t> constants_;
  std::vector<std::pair<int, Variable>> used_;
};

}  // namespace

bool Operands::has(std::string_view word) const {
  for (const std::string& each : words) {
    if (each == word) return true;
  }
  return false;
}

std::vector<int> Operands::vector(size_t i) const {
  std::vector<int> result;
  for (const std::string& word : operands.at(i)) result.push_back(reg(word));
  return result;
}

Operands::Address Operands::address(size_t i) const {
  const std::string& text = operands.at(i).at(0);
  if (text.front() != '[' || text.back() != ']') throw std::runtime_error("no address: " + text);
  const std::string inside = text.substr(1, text.size() - 2);
  const size_t plus = inside.find('+');
  if (plus == std::string::npos) return {reg(inside), 0};
  return {reg(trimmed(inside.substr(0, plus))), std::stoll(inside.substr(plus + 1), nullptr, 0)};
}

void load_ptx(const std::vector<std::string>& paths) {
  kernels.clear();
  places.clear();
  files.clear();
  counts.clear();
  for (const std::string& path : paths) read_file(path);
}

bool has_ptx() { return !files.empty(); }

const std::map<std::string, PtxCounts>& ptx_counts() { return counts; }

std::string symbol_of(const void* function) {
  static std::map<const void*, std::string> known;
  std::string& name = known[function];
  if (!name.empty()) return name;
  Dl_info info;
  if (dladdr(function, &info) == 0) throw std::runtime_error("a kernel of no library");
  const std::string library = read_whole(info.dli_fname);
  Elf64_Ehdr header;
  std::memcpy(&header, library.data(), sizeof header);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), library.data() + header.e_shoff,
              sections.size() * sizeof(Elf64_Shdr));
  const auto address =
      reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
    std::memcpy(symbols.data(), library.data() + section.sh_offset, section.sh_size);
    for (const Elf64_Sym& symbol : symbols) {
      if (symbol.st_value != address || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC) continue;
      name = library.data() + sections[section.sh_link].sh_offset + symbol.st_name;
      return name;
    }
  }
  throw std::runtime_error(std::string("no symbol of a kernel in ") + info.dli_fname);
}

void launch_ptx(const std::string& symbol, dim3 grid, dim3 size, size_t shared_bytes,
                const std::vector<std::vector<char>>& params) {
  const std::string name = without_anonymous_names(symbol);
  std::unique_ptr<PtxKernel>& kernel = kernels[name];
  if (kernel == nullptr) {
    const auto place = places.find(name);
    if (place == places.end()) throw std::runtime_error("no PTX of " + symbol);
    kernel = Parser(name, place->second).parse();
  }
  run_ptx(*kernel, &counts[name], grid, size, shared_bytes, params);
}

}  // namespace fastpage::cuda::emulation
